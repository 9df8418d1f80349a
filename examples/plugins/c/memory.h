/* Allocation that traps on failure: in WebAssembly a write through NULL does not trap but writes to
 * address 0. */

#ifndef MEMORY_H
#define MEMORY_H

#include <stdlib.h>

/* Returns NULL for 0 bytes, because the generated code does not free empty lists. */
static inline void *allocate(size_t bytes) {
  if (bytes == 0) return NULL;
  void *memory = malloc(bytes);
  if (memory == NULL) __builtin_trap();
  return memory;
}

#endif
