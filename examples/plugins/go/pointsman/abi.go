package pointsman

import (
	"math"
	"unsafe"
)

//go:wasmimport pointsman:plugin/log@0.1.0 log
func hostLog(level Level, message address, bytes uint32)

//go:wasmimport pointsman:plugin/clock@0.1.0 now-ms
func hostNowMS() uint64

// An address passes the boundary as a number: to the garbage collector, the address of an empty
// text is not a valid pointer.
type address = uint32

func pointer(at address) unsafe.Pointer { return unsafe.Pointer(uintptr(at)) }

// Memory that the host reads or writes, and that the garbage collector must keep until then.
var (
	arguments [][]uint64
	results   []any
)

// allocate returns zeroed memory, aligned to 8 bytes.
func allocate(bytes int) []uint64 { return make([]uint64, (bytes+7)/8) }

// realloc is called by the host for each part of the arguments of a call.
//
//go:wasmexport cabi_realloc
func realloc(old address, oldBytes, align, bytes uint32) address {
	memory := allocate(int(bytes))
	if bytes == 0 {
		return align
	}
	arguments = append(arguments, memory)
	to := unsafe.Slice((*byte)(unsafe.Pointer(&memory[0])), bytes)
	if oldBytes > 0 {
		copy(to, unsafe.Slice((*byte)(pointer(old)), oldBytes))
	}
	return addressOf(&memory[0])
}

func addressOf[T any](value *T) address { return address(uintptr(unsafe.Pointer(value))) }

// ---- Reading arguments. They stay in the memory of realloc, which the texts refer to. ----

func textAt(at address, bytes uint32) string {
	if bytes == 0 {
		return ""
	}
	return unsafe.String((*byte)(pointer(at)), bytes)
}

// text reads a string in memory: a pointer and a length.
func text(at unsafe.Pointer) string {
	return textAt(*(*address)(at), *(*uint32)(unsafe.Add(at, 4)))
}

// attributes reads a list of attribute: 24 bytes each, of which 8 are the name.
func attributes(at address, count uint32) []Attribute {
	list := make([]Attribute, count)
	for i := range list {
		element := unsafe.Add(pointer(at), i*24)
		list[i] = Attribute{text(element), value(unsafe.Add(element, 8))}
	}
	return list
}

// value reads a variant: its case, then at 8 its payload, because one of the payloads is 64 bits.
func value(at unsafe.Pointer) Value {
	payload := unsafe.Add(at, 8)
	switch *(*uint8)(at) {
	case 0:
		return text(payload)
	case 1:
		return *(*int64)(payload)
	case 2:
		return *(*float64)(payload)
	default:
		return *(*uint8)(payload) != 0
	}
}

// event reads the parameters of evaluate and resolve: the fields of an event, flattened. They are
// 16, the most that are passed as parameters and not in memory.
func event(
	id address, idBytes uint32,
	source address, sourceBytes uint32,
	kind address, kindBytes uint32,
	hasSubject uint32, subject address, subjectBytes uint32,
	timeMS uint64, priority uint32,
	attributeList address, attributeCount uint32,
	payloadKind uint32, payload address, payloadBytes uint32,
) *Event {
	event := &Event{
		ID:          textAt(id, idBytes),
		Source:      textAt(source, sourceBytes),
		Type:        textAt(kind, kindBytes),
		TimeMS:      timeMS,
		Priority:    Priority(priority),
		Attributes:  attributes(attributeList, attributeCount),
		PayloadKind: PayloadKind(payloadKind),
	}
	if hasSubject != 0 {
		event.Subject = Some(textAt(subject, subjectBytes))
	}
	if event.PayloadKind != NoPayload {
		event.Payload = []byte(textAt(payload, payloadBytes))
	}
	return event
}

// ---- Writing results. ----

// A writer lays out fields one after the other, each at a multiple of its alignment.
type writer struct{ bytes []byte }

func (w *writer) align(to int) {
	for len(w.bytes)%to != 0 {
		w.bytes = append(w.bytes, 0)
	}
}

func (w *writer) u8(value uint8) { w.bytes = append(w.bytes, value) }

func (w *writer) flag(value bool) {
	if value {
		w.u8(1)
	} else {
		w.u8(0)
	}
}

func (w *writer) u32(value uint32) {
	w.align(4)
	w.bytes = append(w.bytes, byte(value), byte(value>>8), byte(value>>16), byte(value>>24))
}

func (w *writer) u64(value uint64) {
	w.align(8)
	w.u32(uint32(value))
	w.u32(uint32(value >> 32))
}

// text writes a pointer and a length.
func (w *writer) text(value string) {
	results = append(results, value)
	w.u32(addressOf(unsafe.StringData(value)))
	w.u32(uint32(len(value)))
}

// variant writes a case and its payload. Each case takes the size of the largest, and the payload
// begins at a multiple of the largest alignment.
func (w *writer) variant(kind uint8, align, size int, payload func()) {
	w.align(align)
	w.u8(kind)
	w.align(align)
	end := len(w.bytes) + size
	payload()
	for len(w.bytes) < end {
		w.u8(0)
	}
	w.align(align)
}

func option[T any](w *writer, value *T, align, size int, payload func(T)) {
	if value == nil {
		w.variant(0, align, size, func() {})
	} else {
		w.variant(1, align, size, func() { payload(*value) })
	}
}

func (w *writer) optionalText(value *string) { option(w, value, 4, 8, w.text) }

func (w *writer) optionalPriority(value *Priority) {
	option(w, value, 1, 1, func(priority Priority) { w.u8(uint8(priority)) })
}

// list writes a pointer and a number of elements, and the elements elsewhere.
func list[T any](w *writer, elements []T, align int, write func(*writer, T)) {
	var inner writer
	for _, element := range elements {
		inner.align(align)
		write(&inner, element)
	}
	w.u32(inner.keep())
	w.u32(uint32(len(elements)))
}

// keep copies the bytes to where they stay until the host has read them.
func (w *writer) keep() address {
	if len(w.bytes) == 0 {
		return 8
	}
	memory := allocate(len(w.bytes))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&memory[0])), len(w.bytes)), w.bytes)
	results = append(results, memory)
	return addressOf(&memory[0])
}

func (w *writer) texts(values []string) { list(w, values, 4, (*writer).text) }

func (w *writer) value(value Value) {
	switch value := value.(type) {
	case string:
		w.variant(0, 8, 8, func() { w.text(value) })
	case int64:
		w.variant(1, 8, 8, func() { w.u64(uint64(value)) })
	case float64:
		w.variant(2, 8, 8, func() { w.u64(math.Float64bits(value)) })
	case bool:
		w.variant(3, 8, 8, func() { w.flag(value) })
	default:
		panic("a value of an attribute is a string, an int64, a float64 or a bool")
	}
}

func (w *writer) attribute(attribute Attribute) {
	w.text(attribute.Name)
	w.value(attribute.Value)
}

func (w *writer) attributes(attributes []Attribute) {
	list(w, attributes, 8, (*writer).attribute)
}

func (w *writer) test(test Test) {
	w.text(test.Attribute)
	w.u8(uint8(test.Operator))
	list(w, test.Values, 8, (*writer).value)
}

func (w *writer) clauses(clauses [][]Test) {
	list(w, clauses, 4, func(w *writer, tests []Test) { list(w, tests, 4, (*writer).test) })
}

func (w *writer) target(target Target) {
	w.variant(target.kind, 4, 8, func() {
		if target.kind != 2 {
			w.text(target.name)
		}
	})
}

func (w *writer) route(route Route) {
	list(w, route.Targets, 4, (*writer).target)
	var when *[][]Test
	if route.When != nil {
		when = &route.When
	}
	option(w, when, 4, 8, w.clauses)
	w.optionalPriority(route.Priority)
	option(w, route.TTLMS, 8, 8, w.u64)
	w.optionalText(route.CollapseKey)
	w.optionalText(route.EventName)
	w.optionalText(route.Body)
	w.attributes(route.Options)
}

func (w *writer) failure(failure failure) {
	w.variant(failure.kind, 4, 8, func() { w.text(failure.reason) })
}

func (w *writer) verdict(verdict Verdict) {
	w.variant(verdict.kind, 4, 20, func() {
		switch verdict.kind {
		case 1:
			w.text(verdict.reason)
		case 2:
			w.optionalPriority(verdict.priority)
			w.attributes(verdict.attributes)
			w.attributes(verdict.Options)
		}
	})
}

// answer passes a result to the host. The arguments of the call are no longer needed.
func answer(write func(*writer)) address {
	results = results[:0]
	var w writer
	write(&w)
	arguments = arguments[:0]
	return w.keep()
}

//go:wasmexport pointsman:plugin/lifecycle@0.1.0#describe
func describe() address {
	manifest := Describe()
	return answer(func(w *writer) {
		w.text(manifest.Name)
		w.text(manifest.Version)
		w.text(manifest.Description)
		w.texts(manifest.Types)
		w.texts(manifest.Attributes)
		w.texts(manifest.Fields)
		w.flag(manifest.Payload)
		var schema *string
		if manifest.ConfigSchema != "" {
			schema = &manifest.ConfigSchema
		}
		w.optionalText(schema)
		w.attributes(manifest.Options)
	})
}

//go:wasmexport pointsman:plugin/lifecycle@0.1.0#configure
func configure(config address, bytes uint32) address {
	issues := Configure([]byte(textAt(config, bytes)))
	return answer(func(w *writer) {
		if len(issues) == 0 {
			w.variant(0, 4, 8, func() {})
			return
		}
		w.variant(1, 4, 8, func() {
			list(w, issues, 4, func(w *writer, issue Issue) {
				w.text(issue.Path)
				w.text(issue.Message)
			})
		})
	})
}
