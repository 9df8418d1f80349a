// Notifies customers about their parcels: a filter and a router. ../README.md describes its
// decisions.
package main

import (
	"bytes"
	"encoding/json"
	"sort"
	"strconv"

	. "local/parcels/pointsman"
)

const hourMS = 3_600_000

var urgentFee = 100.0

func main() {}

func init() {
	Describe, Configure, Evaluate, Resolve = describe, configure, evaluate, resolve
}

func describe() Manifest {
	return Manifest{
		Name:         "parcels",
		Version:      "0.1.0",
		Description:  "Notifies customers about their parcels",
		Types:        []string{"parcel.*"},
		Attributes:   []string{"customer", "depot", "late", "test"},
		Fields:       []string{"/fee", "/heavier_than", "/hours_late", "/number"},
		Payload:      true,
		ConfigSchema: `{"type":"object","additionalProperties":false,"properties":{"urgent_fee":{"type":"number","minimum":0,"default":100}}}`,
	}
}

func configure(config []byte) []Issue {
	var keys map[string]any
	if err := json.Unmarshal(config, &keys); err != nil {
		return []Issue{{"", err.Error()}}
	}
	urgentFee = 100
	var issues []Issue
	for key, value := range keys {
		if key != "urgent_fee" {
			issues = append(issues, Issue{key, "is unknown; the only key is urgent_fee"})
		} else if fee, isNumber := value.(float64); !isNumber || fee < 0 {
			issues = append(issues, Issue{key, "use a number of 0 or more"})
		} else {
			urgentFee = fee
		}
	}
	// The order of a map is random.
	sort.Slice(issues, func(i, j int) bool { return issues[i].Path < issues[j].Path })
	return issues
}

func evaluate(event *Event) (Verdict, error) {
	if test := event.Attribute("test"); test == true || test == "true" {
		return Drop("test event"), nil
	}
	if NowMS() > event.TimeMS+7*24*hourMS {
		return Drop("older than 7 days"), nil
	}
	if hours, isNumber := number(event, "/hours_late"); isNumber && hours >= 24 {
		var priority *Priority
		if event.Priority < High {
			priority = Some(High)
		}
		return Amend(priority, Attribute{Name: "late", Value: true}), nil
	}
	return Keep(), nil
}

func resolve(event *Event) ([]Route, error) {
	switch event.Type {
	case "parcel.moved":
		return moved(event)
	case "parcel.delivered":
		return delivered(event)
	case "parcel.held":
		return held(event)
	case "parcel.recalled":
		return recalled(event)
	}
	return nil, nil
}

func moved(event *Event) ([]Route, error) {
	customer, err := customerOf(event)
	if err != nil {
		return nil, err
	}
	parcel, err := parcelOf(event)
	if err != nil {
		return nil, err
	}
	place, stops, err := lastPlace(event)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(map[string]any{"number": parcel, "place": place, "stops": stops})
	if err != nil {
		return nil, err
	}
	route := Route{
		Targets:     []Target{customer},
		TTLMS:       Some[uint64](6 * hourMS),
		CollapseKey: Some("parcel-" + parcel),
		EventName:   Some("parcel"),
		Body:        Some(string(body)),
	}
	if event.Attribute("late") != true {
		route.Priority = Some(Low)
	}
	return []Route{route}, nil
}

func delivered(event *Event) ([]Route, error) {
	customer, err := customerOf(event)
	if err != nil {
		return nil, err
	}
	parcel, err := parcelOf(event)
	if err != nil {
		return nil, err
	}
	targets := []Target{customer}
	if depot, _ := event.Attribute("depot").(string); depot != "" {
		targets = append(targets, Group("depot-"+depot))
	}
	return []Route{{
		Targets:     targets,
		CollapseKey: Some("parcel-" + parcel),
		EventName:   Some("parcel"),
	}}, nil
}

func held(event *Event) ([]Route, error) {
	customer, err := customerOf(event)
	if err != nil {
		return nil, err
	}
	fee, isKnown := number(event, "/fee")
	if !isKnown {
		return nil, Retry("the fee is not known yet")
	}
	priority := High
	if fee >= urgentFee {
		priority = Urgent
	}
	onDuty := [][]Test{
		{{Attribute: "shift", Operator: Equals, Values: []Value{"day"}}},
		{
			{Attribute: "role", Operator: OneOf, Values: []Value{"lead", "stand-in"}},
			{Attribute: "open", Operator: Less, Values: []Value{int64(50)}},
		},
	}
	return []Route{
		{Targets: []Target{customer}, Priority: &priority, EventName: Some("parcel")},
		{
			Targets: []Target{Group("customs")},
			When:    onDuty,
			TTLMS:   Some[uint64](12 * hourMS),
			Options: []Attribute{{Name: "slot", Value: "customs"}},
		},
	}, nil
}

func recalled(event *Event) ([]Route, error) {
	parcel, err := parcelOf(event)
	if err != nil {
		return nil, err
	}
	Log(Warn, "a recall goes to everyone")
	concerned := Test{Attribute: "parcels", Operator: Greater, Values: []Value{int64(0)}}
	if _, isNumber := number(event, "/heavier_than"); isNumber {
		weight := event.Attribute("/heavier_than")
		concerned = Test{Attribute: "weight", Operator: Greater, Values: []Value{weight}}
	}
	return []Route{{
		Targets:     []Target{Everyone()},
		When:        [][]Test{{{Attribute: "staff", Operator: Present}}, {concerned}},
		Priority:    Some(Urgent),
		TTLMS:       Some[uint64](24 * hourMS),
		CollapseKey: Some("recall-" + parcel),
		EventName:   Some("recall"),
	}}, nil
}

func customerOf(event *Event) (Target, error) {
	if name := nameIn(event, "customer"); name != "" {
		return User(name), nil
	}
	return Target{}, Reject("the event has no customer; set the attribute customer to a text or an integer")
}

func parcelOf(event *Event) (string, error) {
	if number := nameIn(event, "/number"); number != "" {
		return number, nil
	}
	return "", Reject("the payload has no parcel number; set /number to a text or an integer")
}

// lastPlace returns the location of the parcel and its number of stops. A JSON pointer cannot select
// the last element of a list, so the payload is parsed here.
func lastPlace(event *Event) (string, int, error) {
	var payload any
	if event.PayloadKind == JSON {
		// As text, because numbers may exceed a float64.
		decoder := json.NewDecoder(bytes.NewReader(event.Payload))
		decoder.UseNumber()
		if err := decoder.Decode(&payload); err != nil {
			return "", 0, err
		}
	}
	// A type assertion that fails leaves nil, in which every further step finds nothing.
	object, _ := payload.(map[string]any)
	steps, _ := object["steps"].([]any)
	if len(steps) > 0 {
		last, _ := steps[len(steps)-1].(map[string]any)
		if place, _ := last["place"].(string); place != "" {
			return place, len(steps), nil
		}
	}
	return "", 0, Reject("the payload has no place; set place in the last element of /steps")
}

// nameIn returns a text, or an integer as text; empty if there is neither.
func nameIn(event *Event, attribute string) string {
	switch value := event.Attribute(attribute).(type) {
	case string:
		return value
	case int64:
		return strconv.FormatInt(value, 10)
	}
	return ""
}

func number(event *Event, field string) (float64, bool) {
	switch value := event.Attribute(field).(type) {
	case int64:
		return float64(value), true
	case float64:
		return value, true
	}
	return 0, false
}
