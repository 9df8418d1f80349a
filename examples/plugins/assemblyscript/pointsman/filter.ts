// The export of a filter.

import { Writer, freeResults } from "./contract";
import { beginResult, takeEvent } from "./event";
import { evaluate } from "../plugin";

export function filter_evaluate(
  id: usize, idBytes: usize, source: usize, sourceBytes: usize, type: usize, typeBytes: usize,
  hasSubject: u32, subject: usize, subjectBytes: usize, timeMs: u64, priority: u32,
  attributes: usize, nAttributes: i32, payloadKind: u32, payload: usize, payloadBytes: usize,
): usize {
  freeResults();
  const verdict = evaluate(takeEvent(
    id, idBytes, source, sourceBytes, type, typeBytes, hasSubject, subject, subjectBytes,
    timeMs, priority, attributes, nAttributes, payloadKind, payload, payloadBytes,
  ));
  const writer = new Writer();
  const end = beginResult(writer, verdict.failure, 24);
  if (verdict.failure == null) writer.verdict(verdict);
  writer.endVariant(end, 4);
  return writer.finish();
}
