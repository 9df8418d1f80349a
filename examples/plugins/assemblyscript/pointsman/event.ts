// What the exports of a filter and of a router have in common.

import { Event, Failure, PayloadKind, Writer, takeAttributes, takeText } from "./contract";

/** Takes the fields of an event, which the host passes as parameters. */
export function takeEvent(
  id: usize, idBytes: usize, source: usize, sourceBytes: usize, type: usize, typeBytes: usize,
  hasSubject: u32, subject: usize, subjectBytes: usize, timeMs: u64, priority: u32,
  attributes: usize, nAttributes: i32, payloadKind: u32, payload: usize, payloadBytes: usize,
): Event {
  const event = new Event();
  event.id = takeText(id, idBytes);
  event.source = takeText(source, sourceBytes);
  event.type = takeText(type, typeBytes);
  if (hasSubject) event.subject = takeText(subject, subjectBytes);
  event.timeMs = timeMs;
  event.priority = priority;
  event.attributes = takeAttributes(attributes, nAttributes);
  event.payloadKind = payloadKind;
  if (payloadKind != PayloadKind.none) event.payload = takeText(payload, payloadBytes);
  return event;
}

/** Begins a result: 0 and a value, or 1 and a failure. */
export function beginResult(writer: Writer, failure: Failure | null, size: usize): usize {
  const end = writer.variant(failure == null ? 0 : 1, 4, size);
  if (failure != null) writer.failure(failure);
  return end;
}
