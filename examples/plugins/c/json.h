/* Reads JSON that is known to be valid, as the host promises of a payload and of a configuration; it checks nothing, and would read on
 * beyond the end of anything else. No more of it than parcels.c needs. */

#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Where a value begins. Whoever made it keeps the text alive. NULL: there is none. */
typedef const uint8_t *json;

/* Text in UTF-8 without a NUL at its end; it may have some within. */
typedef struct {
  uint8_t *bytes;
  size_t len;
} json_string;

/* The value behind leading white space. */
json json_value(const uint8_t *text);

/* Walks through an object or a list: before the first call, `*at` is the value itself. false: there is no further one, or it is neither. */
bool json_next_member(json *at, json *name, json *value);
bool json_next_item(json *at, json *item);

/* The member of this name, of several the last. NULL if there is none, or if it is no object. */
json json_member(json object, const char *name);

/* What a string says, without its escapes, in memory from malloc; false, and nothing to free, if it is no string. */
bool json_text(json value, json_string *text);

/* false if it is no number. */
bool json_number(json value, double *number);

#endif
