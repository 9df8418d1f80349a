"""Routes order events to the order's owner and to the group of its region."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.lifecycle import Issue, Manifest, Selection
from wit_world.exports.router import Route
from wit_world.imports.types import Target_Group, Target_User, Value_Text

# The event attribute that names the owner of the order.
owner = "owner"


class Lifecycle(exports.Lifecycle):
    def describe(self):
        """Return the manifest. Only what it lists is available in `resolve`."""
        schema = {"type": "object", "additionalProperties": False, "properties": {"owner": {"type": "string", "minLength": 1}}}
        return Manifest(
            name="my-plugin",
            version="0.1.0",
            description="A router for Pointsman",
            types=["order.*"],
            reads=Selection(attributes=[owner], fields=["/order/region"], payload=False),
            config_schema=json.dumps(schema),
            options=[],
        )

    def configure(self, config):
        global owner
        name = json.loads(config).get("owner", owner)
        if not isinstance(name, str) or not name:
            raise Err([Issue("owner", "name an attribute, such as customer")])
        owner = name


class Router(exports.Router):
    def resolve(self, event):
        texts = {a.name: a.value.value for a in event.attributes if isinstance(a.value, Value_Text)}
        targets = []
        if owner in texts:
            targets.append(Target_User(texts[owner]))
        if "/order/region" in texts:
            targets.append(Target_Group(f"region-{texts['/order/region']}"))
        return [Route([target], None, None, None, None, None, None, []) for target in targets]
