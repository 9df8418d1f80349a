// The export of a router.

import { Writer, freeResults } from "./contract";
import { beginResult, takeEvent } from "./event";
import { resolve } from "../plugin";

export function router_resolve(
  id: usize, idBytes: usize, source: usize, sourceBytes: usize, type: usize, typeBytes: usize,
  hasSubject: u32, subject: usize, subjectBytes: usize, timeMs: u64, priority: u32,
  attributes: usize, nAttributes: i32, payloadKind: u32, payload: usize, payloadBytes: usize,
): usize {
  freeResults();
  const resolution = resolve(takeEvent(
    id, idBytes, source, sourceBytes, type, typeBytes, hasSubject, subject, subjectBytes,
    timeMs, priority, attributes, nAttributes, payloadKind, payload, payloadBytes,
  ));
  const writer = new Writer();
  const end = beginResult(writer, resolution.failure, 12);
  if (resolution.failure == null) writer.routes(resolution.routes);
  writer.endVariant(end, 4);
  return writer.finish();
}
