// Routes order events to the order's owner and to the group of its region.
package main

import (
	"encoding/json"

	. "local/my-plugin/pointsman"
)

// owner is the event attribute that names the owner of the order.
var owner = "owner"

func main() {}

func init() {
	Describe, Configure, Resolve = describe, configure, resolve
}

// Only what is listed here is available in resolve.
func describe() Manifest {
	return Manifest{
		Name:         "my-plugin",
		Version:      "0.1.0",
		Description:  "A router for Pointsman",
		Types:        []string{"order.*"},
		Attributes:   []string{owner},
		Fields:       []string{"/order/region"},
		ConfigSchema: `{"type":"object","additionalProperties":false,"properties":{"owner":{"type":"string","minLength":1}}}`,
	}
}

func configure(config []byte) []Issue {
	keys := struct{ Owner string }{owner}
	if err := json.Unmarshal(config, &keys); err != nil {
		return []Issue{{Path: "owner", Message: err.Error()}}
	}
	if keys.Owner == "" {
		return []Issue{{Path: "owner", Message: "name an attribute, such as customer"}}
	}
	owner = keys.Owner
	return nil
}

func resolve(event *Event) ([]Route, error) {
	var routes []Route
	if id, isText := event.Attribute(owner).(string); isText {
		routes = append(routes, Route{Targets: []Target{User(id)}})
	}
	if region, isText := event.Attribute("/order/region").(string); isText {
		routes = append(routes, Route{Targets: []Target{Group("region-" + region)}})
	}
	return routes, nil
}
