/* Reads JSON that is known to be valid, as the host guarantees for payloads and configurations. It
 * checks nothing and reads past the end of invalid JSON. It has only the functions that parcels.c
 * needs. */

#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The start of a value; NULL if there is none. The caller keeps the text alive. */
typedef const uint8_t *json;

/* UTF-8 text without a terminating NUL. It may contain NULs. */
typedef struct {
  uint8_t *bytes;
  size_t len;
} json_string;

/* Returns the value after leading white space. */
json json_value(const uint8_t *text);

/* Iterates over an object or a list. Before the first call, `*at` is the value itself. Returns
 * false after the last element, or if the value has another type. */
bool json_next_member(json *at, json *name, json *value);
bool json_next_item(json *at, json *item);

/* Returns the member with this name, or the last one if there are several. Returns NULL if there is
 * none or if the value is not an object. */
json json_member(json object, const char *name);

/* Decodes a string into memory from malloc. Returns false, with nothing to free, if the value is
 * not a string. */
bool json_text(json value, json_string *text);

/* Returns false if the value is not a number. */
bool json_number(json value, double *number);

#endif
