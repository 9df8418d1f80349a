"""Drops orders from the test system and raises the priority of large orders."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.filter import Amendment, Verdict_Amend, Verdict_Drop, Verdict_Keep
from wit_world.exports.lifecycle import Issue, Manifest, Selection
from wit_world.imports.types import Attribute, Priority, Value_Decimal, Value_Flag, Value_Integer, Value_Text

# The minimum total of a large order.
large = 1000


class Lifecycle(exports.Lifecycle):
    def describe(self):
        """Return the manifest. Only what it lists is available in `evaluate`."""
        schema = {"type": "object", "additionalProperties": False, "properties": {"large": {"type": "number", "exclusiveMinimum": 0}}}
        return Manifest(
            name="my-plugin",
            version="0.1.0",
            description="A filter for Pointsman",
            types=["order.*"],
            reads=Selection(attributes=["test"], fields=["/order/total"], payload=False),
            config_schema=json.dumps(schema),
            options=[],
        )

    def configure(self, config):
        global large
        total = json.loads(config).get("large", large)
        # In Python, True is an instance of int.
        if type(total) not in (int, float) or total <= 0:
            raise Err([Issue("large", "give a number above 0")])
        large = total


class Filter(exports.Filter):
    def evaluate(self, event):
        values = {attribute.name: attribute.value for attribute in event.attributes}
        # Attributes of events added with XADD are always text.
        test = values.get("test")
        if test in (Value_Flag(True), Value_Text("true")):
            return Verdict_Drop("order from the test system")
        total = values.get("/order/total")
        if not isinstance(total, (Value_Integer, Value_Decimal)) or total.value < large:
            return Verdict_Keep()
        # Plugins called after this one see the attribute.
        return Verdict_Amend(Amendment(Priority.HIGH, [Attribute("desk", Value_Text("large"))], []))
