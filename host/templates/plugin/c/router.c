/* Routes order events to the order's owner and to the group of its region.
 *
 * Ownership: a call owns its arguments and frees them before it returns. The generated code owns the
 * result and frees every part of it, so every part comes from malloc. */

#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "memory.h"
#include "router_plugin.h"

typedef router_plugin_string_t string;
typedef router_plugin_list_string_t strings;
typedef pointsman_plugin_types_event_t event;
typedef pointsman_plugin_types_failure_t failure;
typedef pointsman_plugin_types_target_t target;
typedef pointsman_plugin_types_value_t value;
typedef exports_pointsman_plugin_lifecycle_issue_t issue;
typedef exports_pointsman_plugin_lifecycle_list_issue_t issues;
typedef exports_pointsman_plugin_lifecycle_manifest_t manifest;
typedef exports_pointsman_plugin_router_list_route_t routes;
typedef exports_pointsman_plugin_router_route_t route;

/* The event attribute that names the owner of the order. */
static string owner = {(uint8_t *)"owner", 5};

static string copy(string of) {
  string made;
  router_plugin_string_dup_n(&made, (const char *)of.ptr, of.len);
  return made;
}

static string text(const char *literal) { return copy((string){(uint8_t *)literal, strlen(literal)}); }

static strings one(string name) {
  strings made = {allocate(sizeof(string)), 1};
  made.ptr[0] = name;
  return made;
}

/* Only what is listed here is available in resolve. */
void exports_pointsman_plugin_lifecycle_describe(manifest *ret) {
  *ret = (manifest){
      .name = text("my-plugin"),
      .version = text("0.1.0"),
      .description = text("A router for Pointsman"),
      .types = one(text("order.*")),
      .reads = {.attributes = one(copy(owner)), .fields = one(text("/order/region"))},
      .config_schema = {true, text("{\"type\":\"object\",\"additionalProperties\":false,"
                                   "\"properties\":{\"owner\":{\"type\":\"string\",\"minLength\":1}}}")},
  };
}

/* Returns true on success, like every function of the contract that can fail. */
bool exports_pointsman_plugin_lifecycle_configure(string *config, issues *err) {
  json found = json_member(json_value(config->ptr), "owner");
  json_string name = {NULL, 0};
  bool is_good = found == NULL || (json_text(found, &name) && name.len > 0);
  router_plugin_string_free(config);
  if (!is_good) {
    *err = (issues){allocate(sizeof(issue)), 1};
    err->ptr[0] = (issue){text("owner"), text("name an attribute, such as customer")};
    return false;
  }
  if (found != NULL) owner = (string){name.bytes, name.len};
  return true;
}

/* Returns a text attribute, or a text field by its pointer; NULL if the event does not have it. */
static const string *find_text(const event *e, string name) {
  for (size_t i = 0; i < e->attributes.len; i++) {
    const pointsman_plugin_types_attribute_t *a = &e->attributes.ptr[i];
    bool is_it = a->name.len == name.len && memcmp(a->name.ptr, name.ptr, name.len) == 0;
    if (is_it && a->value.tag == POINTSMAN_PLUGIN_TYPES_VALUE_TEXT) return &a->value.val.text;
  }
  return NULL;
}

static void add(routes *to, target recipient) {
  route made = {0};
  made.targets.ptr = allocate(sizeof recipient);
  made.targets.ptr[0] = recipient;
  made.targets.len = 1;
  to->ptr = realloc(to->ptr, (to->len + 1) * sizeof made);
  if (to->ptr == NULL) __builtin_trap();
  to->ptr[to->len++] = made;
}

bool exports_pointsman_plugin_router_resolve(event *e, routes *ret, failure *err) {
  static const char REGION[] = "region-";
  (void)err;
  *ret = (routes){NULL, 0};
  const string *id = find_text(e, owner);
  if (id != NULL) add(ret, (target){.tag = POINTSMAN_PLUGIN_TYPES_TARGET_USER, .val.user = copy(*id)});
  const string *region = find_text(e, (string){(uint8_t *)"/order/region", 13});
  if (region != NULL) {
    string name = {allocate(strlen(REGION) + region->len), strlen(REGION) + region->len};
    memcpy(name.ptr, REGION, strlen(REGION));
    memcpy(name.ptr + strlen(REGION), region->ptr, region->len);
    add(ret, (target){.tag = POINTSMAN_PLUGIN_TYPES_TARGET_GROUP, .val.group = name});
  }
  pointsman_plugin_types_event_free(e);
  return true;
}
