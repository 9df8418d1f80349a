/* Notifies customers about their parcels: a filter and a router. ../README.md describes its
 * decisions.
 *
 * Ownership: a call owns its event and frees it before it returns. The generated code owns the
 * result and frees every part of it, so every part comes from malloc and none from the event. */

#include <stdlib.h>
#include <string.h>

#include "full_plugin.h"
#include "json.h"
#include "memory.h"

/* Short aliases for the generated names, which contain the full path in the contract. */
typedef full_plugin_string_t string;
typedef pointsman_plugin_types_attribute_t attribute;
typedef pointsman_plugin_types_event_t event;
typedef pointsman_plugin_types_failure_t failure;
typedef pointsman_plugin_types_list_test_t clause;
typedef pointsman_plugin_types_priority_t priority;
typedef pointsman_plugin_types_target_t target;
typedef pointsman_plugin_types_test_t test;
typedef pointsman_plugin_types_value_t value;
typedef exports_pointsman_plugin_filter_verdict_t verdict;
typedef exports_pointsman_plugin_lifecycle_issue_t issue;
typedef exports_pointsman_plugin_lifecycle_list_issue_t issues;
typedef exports_pointsman_plugin_lifecycle_manifest_t manifest;
typedef exports_pointsman_plugin_router_list_route_t routes;
typedef exports_pointsman_plugin_router_route_t route;

enum {
  TEXT = POINTSMAN_PLUGIN_TYPES_VALUE_TEXT,
  INTEGER = POINTSMAN_PLUGIN_TYPES_VALUE_INTEGER,
  DECIMAL = POINTSMAN_PLUGIN_TYPES_VALUE_DECIMAL,
  FLAG = POINTSMAN_PLUGIN_TYPES_VALUE_FLAG,
  LOW = POINTSMAN_PLUGIN_TYPES_PRIORITY_LOW,
  HIGH = POINTSMAN_PLUGIN_TYPES_PRIORITY_HIGH,
  URGENT = POINTSMAN_PLUGIN_TYPES_PRIORITY_URGENT,
};

#define HOUR_MS UINT64_C(3600000)
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

static double urgent_fee = 100;

/* ---- Values and texts. ---- */

static string text(const char *literal) {
  string made;
  full_plugin_string_dup(&made, literal);
  return made;
}

/* Returns the text with a prefix. */
static string prefixed(const char *prefix, string of) {
  size_t len = strlen(prefix);
  string made = {allocate(len + of.len), len + of.len};
  memcpy(made.ptr, prefix, len);
  memcpy(made.ptr + len, of.ptr, of.len);
  return made;
}

static string decimal_digits(int64_t number) {
  char digits[20];
  size_t at = sizeof digits;
  uint64_t rest = number < 0 ? 0 - (uint64_t)number : (uint64_t)number;
  do digits[--at] = (char)('0' + rest % 10);
  while ((rest /= 10) > 0);
  if (number < 0) digits[--at] = '-';
  string made;
  full_plugin_string_dup_n(&made, digits + at, sizeof digits - at);
  return made;
}

static bool is_text(const value *v, const char *literal) {
  return v != NULL && v->tag == TEXT && v->val.text.len == strlen(literal) && memcmp(v->val.text.ptr, literal, v->val.text.len) == 0;
}

static bool is_true(const value *v) { return v != NULL && v->tag == FLAG && v->val.flag; }

static bool is_number(const value *v) { return v != NULL && (v->tag == INTEGER || v->tag == DECIMAL); }

static double number_in(const value *v) { return v->tag == INTEGER ? (double)v->val.integer : v->val.decimal; }

/* Returns an attribute, or a field by its pointer; NULL if the event does not have it. */
static const value *find(const event *e, const char *name) {
  for (size_t i = 0; i < e->attributes.len; i++) {
    const attribute *a = &e->attributes.ptr[i];
    if (a->name.len == strlen(name) && memcmp(a->name.ptr, name, a->name.len) == 0) return &a->value;
  }
  return NULL;
}

/* Finds a non-empty text, or an integer as text. */
static bool find_name(const event *e, const char *name, string *found) {
  const value *v = find(e, name);
  if (v == NULL || (v->tag == TEXT ? v->val.text.len == 0 : v->tag != INTEGER)) return false;
  *found = v->tag == TEXT ? prefixed("", v->val.text) : decimal_digits(v->val.integer);
  return true;
}

/* ---- Building the JSON text of the body. ---- */

static void append(string *to, const void *bytes, size_t len) {
  to->ptr = realloc(to->ptr, to->len + len);
  if (to->ptr == NULL) __builtin_trap();
  memcpy(to->ptr + to->len, bytes, len);
  to->len += len;
}

static void append_literal(string *to, const char *literal) { append(to, literal, strlen(literal)); }

static void append_quoted(string *to, const uint8_t *bytes, size_t len) {
  static const char HEX[] = "0123456789abcdef";
  append_literal(to, "\"");
  for (size_t i = 0; i < len; i++) {
    char escape[] = {'\\', 'u', '0', '0', HEX[bytes[i] >> 4], HEX[bytes[i] & 15]};
    if (bytes[i] < 0x20) {
      append(to, escape, sizeof escape);
    } else {
      if (bytes[i] == '"' || bytes[i] == '\\') append_literal(to, "\\");
      append(to, &bytes[i], 1);
    }
  }
  append_literal(to, "\"");
}

/* ---- Lifecycle. ---- */

static full_plugin_list_string_t texts(const char *const *literals, size_t len) {
  full_plugin_list_string_t made = {allocate(len * sizeof(string)), len};
  for (size_t i = 0; i < len; i++) made.ptr[i] = text(literals[i]);
  return made;
}

void exports_pointsman_plugin_lifecycle_describe(manifest *ret) {
  static const char *const TYPES[] = {"parcel.*"};
  static const char *const ATTRIBUTES[] = {"customer", "depot", "late", "test"};
  static const char *const FIELDS[] = {"/fee", "/heavier_than", "/hours_late", "/number"};
  *ret = (manifest){
      .name = text("parcels"),
      .version = text("0.1.0"),
      .description = text("Notifies customers about their parcels"),
      .types = texts(TYPES, LENGTH(TYPES)),
      .reads = {.attributes = texts(ATTRIBUTES, LENGTH(ATTRIBUTES)), .fields = texts(FIELDS, LENGTH(FIELDS)), .payload = true},
      .config_schema = {true, text("{\"type\":\"object\",\"additionalProperties\":false,"
                                   "\"properties\":{\"urgent_fee\":{\"type\":\"number\",\"minimum\":0,\"default\":100}}}")},
  };
}

static void complain(issues *of, string path, const char *message) {
  of->ptr = realloc(of->ptr, (of->len + 1) * sizeof(issue));
  if (of->ptr == NULL) __builtin_trap();
  of->ptr[of->len++] = (issue){path, text(message)};
}

/* Returns true on success, like every function of the contract that can fail. */
bool exports_pointsman_plugin_lifecycle_configure(string *config, issues *err) {
  *err = (issues){NULL, 0};
  /* Appends a NUL, because strtod reads one byte past the end of a number. */
  append(config, "", 1);
  json at = json_value(config->ptr), name, member;
  double fee = 100;
  while (json_next_member(&at, &name, &member)) {
    json_string path;
    json_text(name, &path);
    bool is_known = path.len == strlen("urgent_fee") && memcmp(path.bytes, "urgent_fee", path.len) == 0;
    if (!is_known) {
      complain(err, (string){path.bytes, path.len}, "is unknown; the only key is urgent_fee");
    } else {
      free(path.bytes);
      if (!json_number(member, &fee) || fee < 0) complain(err, text("urgent_fee"), "use a number of 0 or more");
    }
  }
  full_plugin_string_free(config);
  if (err->len > 0) return false;
  urgent_fee = fee;
  return true;
}

/* ---- Filter. ---- */

static verdict evaluate(const event *e) {
  const value *late = find(e, "/hours_late"), *test = find(e, "test");
  if (is_true(test) || is_text(test, "true")) {
    return (verdict){.tag = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_DROP, .val.drop = text("test event")};
  }
  if (pointsman_plugin_clock_now_ms() > e->time_ms + 7 * 24 * HOUR_MS) {
    return (verdict){.tag = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_DROP, .val.drop = text("older than 7 days")};
  }
  if (is_number(late) && number_in(late) >= 24) {
    verdict amended = {.tag = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_AMEND};
    attribute *set = allocate(sizeof *set);
    *set = (attribute){text("late"), {.tag = FLAG, .val.flag = true}};
    amended.val.amend.attributes.ptr = set;
    amended.val.amend.attributes.len = 1;
    amended.val.amend.priority.is_some = e->priority < HIGH;
    amended.val.amend.priority.val = HIGH;
    return amended;
  }
  return (verdict){.tag = EXPORTS_POINTSMAN_PLUGIN_FILTER_VERDICT_KEEP};
}

bool exports_pointsman_plugin_filter_evaluate(event *e, verdict *ret, failure *err) {
  (void)err;
  *ret = evaluate(e);
  pointsman_plugin_types_event_free(e);
  return true;
}

/* ---- Router. ---- */

static bool reject(failure *err, const char *why) {
  *err = (failure){.tag = POINTSMAN_PLUGIN_TYPES_FAILURE_REJECT, .val.reject = text(why)};
  return false;
}

static bool find_customer(const event *e, string *customer, failure *err) {
  return find_name(e, "customer", customer) ||
         reject(err, "the event has no customer; set the attribute customer to a text or an integer");
}

static bool find_number(const event *e, string *number, failure *err) {
  return find_name(e, "/number", number) || reject(err, "the payload has no parcel number; set /number to a text or an integer");
}

/* Finds the location of the parcel and its number of stops. A JSON pointer cannot select the last
 * element of a list, so the payload is parsed here. */
static bool find_last_place(const event *e, json_string *place, size_t *stops, failure *err) {
  bool is_json = e->data.tag == POINTSMAN_PLUGIN_TYPES_PAYLOAD_JSON;
  json steps = is_json ? json_member(json_value(e->data.val.json.ptr), "steps") : NULL, step, last = NULL;
  for (*stops = 0; json_next_item(&steps, &step); ++*stops) last = step;
  if (last != NULL && json_text(json_member(last, "place"), place)) {
    if (place->len > 0) return true;
    free(place->bytes);
  }
  return reject(err, "the payload has no place; set place in the last element of /steps");
}

static target to_user(string user) { return (target){.tag = POINTSMAN_PLUGIN_TYPES_TARGET_USER, .val.user = user}; }
static target to_group(string group) { return (target){.tag = POINTSMAN_PLUGIN_TYPES_TARGET_GROUP, .val.group = group}; }

static route route_to(const target *targets, size_t len) {
  route made = {0};
  made.targets.ptr = allocate(len * sizeof *targets);
  made.targets.len = len;
  memcpy(made.targets.ptr, targets, len * sizeof *targets);
  return made;
}

static value text_value(const char *literal) { return (value){.tag = TEXT, .val.text = text(literal)}; }
static value integer_value(int64_t number) { return (value){.tag = INTEGER, .val.integer = number}; }

static test test_of(const char *name, pointsman_plugin_types_operator_t operator, const value *values, size_t len) {
  test made = {text(name), operator, {allocate(len * sizeof *values), len}};
  if (len > 0) memcpy(made.values.ptr, values, len * sizeof *values);
  return made;
}

/* A condition that holds if all tests of either clause hold. */
static exports_pointsman_plugin_router_option_criteria_t either(const test *one, size_t one_len, const test *other, size_t other_len) {
  clause *clauses = allocate(2 * sizeof *clauses);
  clauses[0] = (clause){allocate(one_len * sizeof *one), one_len};
  clauses[1] = (clause){allocate(other_len * sizeof *other), other_len};
  memcpy(clauses[0].ptr, one, one_len * sizeof *one);
  memcpy(clauses[1].ptr, other, other_len * sizeof *other);
  return (exports_pointsman_plugin_router_option_criteria_t){true, {{clauses, 2}}};
}

static void set_priority(route *of, priority to) { of->priority = (exports_pointsman_plugin_router_option_priority_t){true, to}; }
static void set_text(full_plugin_option_string_t *field, string to) { *field = (full_plugin_option_string_t){true, to}; }
static void set_ttl(route *of, uint64_t ms) { of->ttl_ms = (full_plugin_option_u64_t){true, ms}; }

static void set_slot(route *of, const char *name) {
  of->options.ptr = allocate(sizeof *of->options.ptr);
  of->options.ptr[0] = (attribute){text("slot"), text_value(name)};
  of->options.len = 1;
}

static routes routes_of(const route *made, size_t len) {
  routes list = {allocate(len * sizeof *made), len};
  if (len > 0) memcpy(list.ptr, made, len * sizeof *made);
  return list;
}

static bool moved(const event *e, routes *ret, failure *err) {
  string customer, number;
  json_string place;
  size_t stops;
  if (!find_customer(e, &customer, err)) return false;
  if (!find_number(e, &number, err)) return full_plugin_string_free(&customer), false;
  if (!find_last_place(e, &place, &stops, err)) return full_plugin_string_free(&customer), full_plugin_string_free(&number), false;
  route made = route_to((target[]){to_user(customer)}, 1);
  if (!is_true(find(e, "late"))) set_priority(&made, LOW);
  set_ttl(&made, 6 * HOUR_MS);
  set_text(&made.collapse_key, prefixed("parcel-", number));
  set_text(&made.event_name, text("parcel"));
  string body = text("{\"number\":"), digits = decimal_digits((int64_t)stops);
  append_quoted(&body, number.ptr, number.len);
  append_literal(&body, ",\"place\":");
  append_quoted(&body, place.bytes, place.len);
  append_literal(&body, ",\"stops\":");
  append(&body, digits.ptr, digits.len);
  append_literal(&body, "}");
  set_text(&made.body, body);
  full_plugin_string_free(&digits);
  full_plugin_string_free(&number);
  free(place.bytes);
  *ret = routes_of(&made, 1);
  return true;
}

static bool delivered(const event *e, routes *ret, failure *err) {
  string customer, number;
  if (!find_customer(e, &customer, err)) return false;
  if (!find_number(e, &number, err)) return full_plugin_string_free(&customer), false;
  const value *depot = find(e, "depot");
  target targets[2] = {to_user(customer)};
  size_t len = 1;
  if (depot != NULL && depot->tag == TEXT && depot->val.text.len > 0) targets[len++] = to_group(prefixed("depot-", depot->val.text));
  route made = route_to(targets, len);
  set_text(&made.collapse_key, prefixed("parcel-", number));
  set_text(&made.event_name, text("parcel"));
  full_plugin_string_free(&number);
  *ret = routes_of(&made, 1);
  return true;
}

static bool held(const event *e, routes *ret, failure *err) {
  string customer;
  if (!find_customer(e, &customer, err)) return false;
  const value *fee = find(e, "/fee");
  if (!is_number(fee)) {
    full_plugin_string_free(&customer);
    *err = (failure){.tag = POINTSMAN_PLUGIN_TYPES_FAILURE_RETRY, .val.retry = text("the fee is not known yet")};
    return false;
  }
  route to_pay = route_to((target[]){to_user(customer)}, 1);
  set_priority(&to_pay, number_in(fee) >= urgent_fee ? URGENT : HIGH);
  set_text(&to_pay.event_name, text("parcel"));
  route to_work = route_to((target[]){to_group(text("customs"))}, 1);
  test by_day = test_of("shift", POINTSMAN_PLUGIN_TYPES_OPERATOR_EQUALS, (value[]){text_value("day")}, 1);
  test in_charge[] = {
      test_of("role", POINTSMAN_PLUGIN_TYPES_OPERATOR_ONE_OF, (value[]){text_value("lead"), text_value("stand-in")}, 2),
      test_of("open", POINTSMAN_PLUGIN_TYPES_OPERATOR_LESS, (value[]){integer_value(50)}, 1),
  };
  to_work.when = either(&by_day, 1, in_charge, 2);
  set_ttl(&to_work, 12 * HOUR_MS);
  set_slot(&to_work, "customs");
  *ret = routes_of((route[]){to_pay, to_work}, 2);
  return true;
}

static bool recalled(const event *e, routes *ret, failure *err) {
  string number, line;
  if (!find_number(e, &number, err)) return false;
  full_plugin_string_set(&line, "a recall goes to everyone");
  pointsman_plugin_log_log(POINTSMAN_PLUGIN_LOG_LEVEL_WARN, &line);
  const value *weight = find(e, "/heavier_than");
  test staff = test_of("staff", POINTSMAN_PLUGIN_TYPES_OPERATOR_PRESENT, NULL, 0);
  test concerned = is_number(weight) ? test_of("weight", POINTSMAN_PLUGIN_TYPES_OPERATOR_GREATER, weight, 1)
                                     : test_of("parcels", POINTSMAN_PLUGIN_TYPES_OPERATOR_GREATER, (value[]){integer_value(0)}, 1);
  route made = route_to((target[]){{.tag = POINTSMAN_PLUGIN_TYPES_TARGET_EVERYONE}}, 1);
  made.when = either(&staff, 1, &concerned, 1);
  set_priority(&made, URGENT);
  set_ttl(&made, 24 * HOUR_MS);
  set_text(&made.collapse_key, prefixed("recall-", number));
  set_text(&made.event_name, text("recall"));
  full_plugin_string_free(&number);
  *ret = routes_of(&made, 1);
  return true;
}

static bool has_type(const event *e, const char *type) { return e->type.len == strlen(type) && memcmp(e->type.ptr, type, e->type.len) == 0; }

static bool resolve(const event *e, routes *ret, failure *err) {
  if (has_type(e, "parcel.moved")) return moved(e, ret, err);
  if (has_type(e, "parcel.delivered")) return delivered(e, ret, err);
  if (has_type(e, "parcel.held")) return held(e, ret, err);
  if (has_type(e, "parcel.recalled")) return recalled(e, ret, err);
  *ret = routes_of(NULL, 0);
  return true;
}

bool exports_pointsman_plugin_router_resolve(event *e, routes *ret, failure *err) {
  bool is_ok = resolve(e, ret, err);
  pointsman_plugin_types_event_free(e);
  return is_ok;
}
