// Drops orders from the test system and raises the priority of large orders.
package main

import (
	"encoding/json"

	. "local/my-plugin/pointsman"
)

// large is the minimum total of a large order.
var large = 1000.0

func main() {}

func init() {
	Describe, Configure, Evaluate = describe, configure, evaluate
}

// Only what is listed here is available in evaluate.
func describe() Manifest {
	return Manifest{
		Name:         "my-plugin",
		Version:      "0.1.0",
		Description:  "A filter for Pointsman",
		Types:        []string{"order.*"},
		Attributes:   []string{"test"},
		Fields:       []string{"/order/total"},
		ConfigSchema: `{"type":"object","additionalProperties":false,"properties":{"large":{"type":"number","exclusiveMinimum":0}}}`,
	}
}

func configure(config []byte) []Issue {
	keys := struct{ Large float64 }{large}
	if err := json.Unmarshal(config, &keys); err != nil {
		return []Issue{{Path: "large", Message: err.Error()}}
	}
	if keys.Large <= 0 {
		return []Issue{{Path: "large", Message: "give a number above 0"}}
	}
	large = keys.Large
	return nil
}

func evaluate(event *Event) (Verdict, error) {
	// Attributes of events added with XADD are always text.
	if test := event.Attribute("test"); test == true || test == "true" {
		return Drop("order from the test system"), nil
	}
	var total float64
	switch value := event.Attribute("/order/total").(type) {
	case int64:
		total = float64(value)
	case float64:
		total = value
	}
	if total < large {
		return Keep(), nil
	}
	// Plugins called after this one see the attribute.
	return Amend(Some(High), Attribute{Name: "desk", Value: "large"}), nil
}
