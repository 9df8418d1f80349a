// Package pointsman is the plugin contract pointsman:plugin@0.1.0 in Go: the types of wit/types.wit,
// and the exports that pass them across the boundary of the WebAssembly module.
//
// It is complete source code without generated parts. abi.go has the memory layout of each type; a
// change of wit/ is a change of one function there.
package pointsman

import (
	"errors"
	"runtime"
	"unsafe"
)

// Priority of a notification.
type Priority uint8

const (
	Low Priority = iota
	Normal
	High
	Urgent
)

// Some returns an optional value, such as the Priority of a Route.
func Some[T any](value T) *T { return &value }

// A Value of an attribute: one of the types string, int64, float64 and bool.
type Value any

type Attribute struct {
	Name  string
	Value Value
}

// PayloadKind is the form of the payload of an event.
type PayloadKind uint8

const (
	NoPayload PayloadKind = iota
	JSON
	Text
	Binary
)

type Event struct {
	ID, Source, Type string
	Subject          *string
	// TimeMS is the time of the event, in milliseconds since the Unix epoch.
	TimeMS      uint64
	Priority    Priority
	Attributes  []Attribute
	PayloadKind PayloadKind
	Payload     []byte
}

// Attribute returns the value of an attribute, or of a payload field by its pointer; nil if the
// event does not have it.
func (event *Event) Attribute(name string) Value {
	for _, attribute := range event.Attributes {
		if attribute.Name == name {
			return attribute.Value
		}
	}
	return nil
}

// Operator of a Test.
type Operator uint8

const (
	Equals Operator = iota
	NotEquals
	OneOf
	Contains
	Prefix
	Less
	Greater
	Present
	Absent
	NotOneOf
	NotContains
	AtLeast
	AtMost
	Suffix
)

// A Test of one attribute of a recipient.
type Test struct {
	Attribute string
	Operator  Operator
	Values    []Value
}

// A Target addresses recipients; see User, Group and Everyone.
type Target struct {
	kind uint8
	name string
}

func User(id string) Target    { return Target{0, id} }
func Group(name string) Target { return Target{1, name} }
func Everyone() Target         { return Target{2, ""} }

type Route struct {
	Targets []Target
	// When restricts the targets to recipients for whom every test of at least one clause holds;
	// nil: all of them.
	When [][]Test
	// Priority is nil for the event's own.
	Priority *Priority
	// TTLMS is in milliseconds; nil: as long as the host retains the notification.
	TTLMS       *uint64
	CollapseKey *string
	EventName   *string
	// Body is JSON that replaces the event's own data.
	Body *string
	// Options are further properties. The host knows slot, a text: the name of a notification of its
	// own. It refuses an unknown name.
	Options []Attribute
}

// A Verdict of a filter; see Keep, Drop and Amend.
type Verdict struct {
	kind       uint8
	reason     string
	priority   *Priority
	attributes []Attribute
	// Options are further properties of an amendment; the host knows none.
	Options []Attribute
}

func Keep() Verdict              { return Verdict{} }
func Drop(reason string) Verdict { return Verdict{kind: 1, reason: reason} }

// Amend sets attributes and, unless it is nil, the priority.
func Amend(priority *Priority, attributes ...Attribute) Verdict {
	return Verdict{kind: 2, priority: priority, attributes: attributes}
}

type failure struct {
	kind   uint8
	reason string
}

func (f failure) Error() string { return f.reason }

// Reject is the error of a plugin that can never decide about this event.
func Reject(reason string) error { return failure{0, reason} }

// Retry is the error of a plugin that cannot decide about this event now.
func Retry(reason string) error { return failure{1, reason} }

// failureOf takes every other error for a permanent one.
func failureOf(err error) failure {
	var known failure
	if errors.As(err, &known) {
		return known
	}
	return failure{0, err.Error()}
}

// Manifest of the plugin; wit/plugin.wit describes the fields.
type Manifest struct {
	Name, Version, Description string
	Types                      []string
	Attributes, Fields         []string
	Payload                    bool
	// ConfigSchema is a JSON Schema; empty: none.
	ConfigSchema string
	// Options are further properties; the host knows none.
	Options []Attribute
}

// An Issue is a problem in the configuration.
type Issue struct{ Path, Message string }

// The plugin, set by an init function of package main.
var (
	Describe  func() Manifest
	Configure func(config []byte) []Issue
	Evaluate  func(event *Event) (Verdict, error)
	Resolve   func(event *Event) ([]Route, error)
)

// Level of a log line.
type Level uint32

const (
	Trace Level = iota
	Debug
	Info
	Warn
	Error
)

// Log writes a line into the log of the host.
func Log(level Level, message string) {
	hostLog(level, addressOf(unsafe.StringData(message)), uint32(len(message)))
	runtime.KeepAlive(message)
}

// NowMS is the time in milliseconds since the Unix epoch, which stands still during a call.
func NowMS() uint64 { return hostNowMS() }
