package pointsman

//go:wasmexport pointsman:plugin/filter@0.1.0#evaluate
func evaluate(
	id address, idBytes uint32,
	source address, sourceBytes uint32,
	kind address, kindBytes uint32,
	hasSubject uint32, subject address, subjectBytes uint32,
	timeMS uint64, priority uint32,
	attributeList address, attributeCount uint32,
	payloadKind uint32, payload address, payloadBytes uint32,
) address {
	verdict, err := Evaluate(event(
		id, idBytes, source, sourceBytes, kind, kindBytes, hasSubject, subject, subjectBytes,
		timeMS, priority, attributeList, attributeCount, payloadKind, payload, payloadBytes,
	))
	return answer(func(w *writer) {
		if err != nil {
			w.variant(1, 4, 24, func() { w.failure(failureOf(err)) })
			return
		}
		w.variant(0, 4, 24, func() { w.verdict(verdict) })
	})
}
