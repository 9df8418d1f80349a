/* Drops orders from the test system and raises the priority of large orders.
 *
 * Ownership: a call owns its arguments and frees them before it returns. The generated code owns the
 * result and frees every part of it, so every part comes from malloc. */

#include <stdlib.h>
#include <string.h>

#include "filter_plugin.h"
#include "json.h"
#include "memory.h"

typedef filter_plugin_string_t string;
typedef filter_plugin_list_string_t strings;
typedef pointsman_plugin_types_attribute_t attribute;
typedef pointsman_plugin_types_event_t event;
typedef pointsman_plugin_types_failure_t failure;
typedef pointsman_plugin_types_value_t value;
typedef exports_pointsman_plugin_filter_verdict_t verdict;
typedef exports_pointsman_plugin_lifecycle_issue_t issue;
typedef exports_pointsman_plugin_lifecycle_list_issue_t issues;
typedef exports_pointsman_plugin_lifecycle_manifest_t manifest;

enum {
  TEXT = POINTSMAN_PLUGIN_TYPES_VALUE_TEXT,
  INTEGER = POINTSMAN_PLUGIN_TYPES_VALUE_INTEGER,
  DECIMAL = POINTSMAN_PLUGIN_TYPES_VALUE_DECIMAL,
  FLAG = POINTSMAN_PLUGIN_TYPES_VALUE_FLAG,
  DROP = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_DROP,
  AMEND = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_AMEND,
};

/* The minimum total of a large order. */
static double large = 1000;

static string text(const char *literal) {
  string made;
  filter_plugin_string_dup(&made, literal);
  return made;
}

static strings one(string name) {
  strings made = {allocate(sizeof(string)), 1};
  made.ptr[0] = name;
  return made;
}

/* Only what is listed here is available in evaluate. */
void exports_pointsman_plugin_lifecycle_describe(manifest *ret) {
  *ret = (manifest){
      .name = text("my-plugin"),
      .version = text("0.1.0"),
      .description = text("A filter for Pointsman"),
      .types = one(text("order.*")),
      .reads = {.attributes = one(text("test")), .fields = one(text("/order/total"))},
      .config_schema = {true, text("{\"type\":\"object\",\"additionalProperties\":false,"
                                   "\"properties\":{\"large\":{\"type\":\"number\",\"exclusiveMinimum\":0}}}")},
  };
}

/* Returns true on success, like every function of the contract that can fail. */
bool exports_pointsman_plugin_lifecycle_configure(string *config, issues *err) {
  json found = json_member(json_value(config->ptr), "large");
  bool is_good = found == NULL || (json_number(found, &large) && large > 0);
  filter_plugin_string_free(config);
  if (is_good) return true;
  *err = (issues){allocate(sizeof(issue)), 1};
  err->ptr[0] = (issue){text("large"), text("give a number above 0")};
  return false;
}

/* Returns an attribute, or a field by its pointer; NULL if the event does not have it. */
static const value *find(const event *e, const char *name) {
  for (size_t i = 0; i < e->attributes.len; i++) {
    const attribute *a = &e->attributes.ptr[i];
    if (a->name.len == strlen(name) && memcmp(a->name.ptr, name, a->name.len) == 0) return &a->value;
  }
  return NULL;
}

static verdict decide(const event *e) {
  const value *test = find(e, "test"), *total = find(e, "/order/total");
  /* Attributes of events added with XADD are always text. */
  bool is_test = test != NULL && test->tag == FLAG && test->val.flag;
  is_test |= test != NULL && test->tag == TEXT && test->val.text.len == 4 && memcmp(test->val.text.ptr, "true", 4) == 0;
  if (is_test) return (verdict){.tag = DROP, .val.drop = text("order from the test system")};
  double number = 0;
  if (total != NULL && total->tag == INTEGER) number = (double)total->val.integer;
  if (total != NULL && total->tag == DECIMAL) number = total->val.decimal;
  if (number < large) return (verdict){.tag = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_KEEP};
  verdict amended = {.tag = AMEND};
  /* Plugins called after this one see the attribute. */
  attribute *desk = allocate(sizeof *desk);
  *desk = (attribute){text("desk"), {.tag = TEXT, .val.text = text("large")}};
  amended.val.amend.attributes.ptr = desk;
  amended.val.amend.attributes.len = 1;
  amended.val.amend.priority.is_some = true;
  amended.val.amend.priority.val = POINTSMAN_PLUGIN_TYPES_PRIORITY_HIGH;
  return amended;
}

bool exports_pointsman_plugin_filter_evaluate(event *e, verdict *ret, failure *err) {
  (void)err;
  *ret = decide(e);
  pointsman_plugin_types_event_free(e);
  return true;
}
