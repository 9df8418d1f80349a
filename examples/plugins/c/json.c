#include "json.h"

#include <stdlib.h>
#include <string.h>

#include "memory.h"

static json skip_space(json at) {
  while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r') at++;
  return at;
}

static json skip_string(json at) {
  for (at++; *at != '"'; at++) {
    if (*at == '\\') at++;
  }
  return at + 1;
}

/* Iterative, so that deep nesting cannot overflow the stack. */
static json skip_value(json at) {
  size_t depth = 0;
  do {
    at = skip_space(at);
    if (*at == '"') {
      at = skip_string(at);
    } else if (*at == '{' || *at == '[') {
      depth++;
      at++;
    } else if (*at == '}' || *at == ']') {
      depth--;
      at++;
    } else if (*at == ',' || *at == ':') {
      at++;
    } else {
      at += strcspn((const char *)at, ",:]} \t\r\n");
    }
  } while (depth > 0);
  return at;
}

json json_value(const uint8_t *text) { return skip_space(text); }

/* Moves from the value itself, or from the end of an element, to the next element. Returns NULL
 * after the last one. */
static json next_element(json at, uint8_t open, uint8_t close) {
  if (at == NULL) return NULL;
  at = skip_space(at);
  if (*at != open && *at != ',') return NULL;
  at = skip_space(at + 1);
  return *at == close ? NULL : at;
}

bool json_next_member(json *at, json *name, json *value) {
  *name = next_element(*at, '{', '}');
  if (*name == NULL) return false;
  *value = skip_space(skip_space(skip_string(*name)) + 1);
  *at = skip_value(*value);
  return true;
}

bool json_next_item(json *at, json *item) {
  *item = next_element(*at, '[', ']');
  if (*item == NULL) return false;
  *at = skip_value(*item);
  return true;
}

json json_member(json object, const char *name) {
  json found = NULL, key, value;
  size_t len = strlen(name);
  while (json_next_member(&object, &key, &value)) {
    json_string text;
    json_text(key, &text);
    if (text.len == len && memcmp(text.bytes, name, len) == 0) found = value;
    free(text.bytes);
  }
  return found;
}

static uint32_t hex4(json at) {
  uint32_t code = 0;
  for (int i = 0; i < 4; i++) {
    uint8_t c = at[i];
    code = code << 4 | (uint32_t)(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  return code;
}

static uint8_t *write_utf8(uint8_t *to, uint32_t code) {
  if (code < 0x80) {
    *to++ = (uint8_t)code;
  } else if (code < 0x800) {
    *to++ = (uint8_t)(0xc0 | code >> 6);
    *to++ = (uint8_t)(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    *to++ = (uint8_t)(0xe0 | code >> 12);
    *to++ = (uint8_t)(0x80 | (code >> 6 & 0x3f));
    *to++ = (uint8_t)(0x80 | (code & 0x3f));
  } else {
    *to++ = (uint8_t)(0xf0 | code >> 18);
    *to++ = (uint8_t)(0x80 | (code >> 12 & 0x3f));
    *to++ = (uint8_t)(0x80 | (code >> 6 & 0x3f));
    *to++ = (uint8_t)(0x80 | (code & 0x3f));
  }
  return to;
}

static const uint8_t *read_escape(json at, uint8_t **to) {
  static const char ESCAPES[] = "bfnrt", MEANT[] = "\b\f\n\r\t";
  const char *known = strchr(ESCAPES, *at);
  if (*at != 'u') {
    *(*to)++ = known != NULL ? (uint8_t)MEANT[known - ESCAPES] : *at;
    return at + 1;
  }
  uint32_t code = hex4(at + 1);
  at += 5;
  bool is_high = code >= 0xd800 && code < 0xdc00;
  if (is_high && at[0] == '\\' && at[1] == 'u') {
    uint32_t low = hex4(at + 2);
    if (low >= 0xdc00 && low < 0xe000) {
      *to = write_utf8(*to, 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00));
      return at + 6;
    }
  }
  /* A lone surrogate becomes the replacement character. */
  *to = write_utf8(*to, code >= 0xd800 && code < 0xe000 ? 0xfffd : code);
  return at;
}

bool json_text(json value, json_string *text) {
  if (value == NULL || *value != '"') return false;
  /* An escape is never shorter than its character, so the source length is sufficient. */
  text->bytes = allocate((size_t)(skip_string(value) - value));
  uint8_t *to = text->bytes;
  for (json at = value + 1; *at != '"';) {
    if (*at == '\\') {
      at = read_escape(at + 1, &to);
    } else {
      *to++ = *at++;
    }
  }
  text->len = (size_t)(to - text->bytes);
  return true;
}

bool json_number(json value, double *number) {
  if (value == NULL || (*value != '-' && (*value < '0' || *value > '9'))) return false;
  *number = strtod((const char *)value, NULL);
  return true;
}
