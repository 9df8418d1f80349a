// The exports of every plugin.

import { Writer, freeResults, realloc, takeText } from "./contract";
import { configure, describe } from "../plugin";

export function cabi_realloc(old: usize, oldBytes: usize, align: usize, bytes: usize): usize {
  return realloc(old, oldBytes, align, bytes);
}

export function lifecycle_describe(): usize {
  freeResults();
  const writer = new Writer();
  writer.manifest(describe());
  return writer.finish();
}

export function lifecycle_configure(config: usize, bytes: usize): usize {
  freeResults();
  const issues = configure(takeText(config, bytes));
  const writer = new Writer();
  const end = writer.variant(issues.length > 0 ? 1 : 0, 4, 8);
  if (issues.length > 0) writer.issues(issues);
  writer.endVariant(end, 4);
  return writer.finish();
}
