"""Notifies customers about their parcels: a filter and a router.

../README.md describes its decisions. 64-bit integers are plain ints. An `err` of the contract is
raised, wrapped in an `Err`.
"""

import functools
import json
import traceback

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.filter import Amendment, Verdict_Amend, Verdict_Drop, Verdict_Keep
from wit_world.exports.lifecycle import Issue, Manifest, Selection
from wit_world.exports.router import Route
from wit_world.imports import clock, log
from wit_world.imports.types import (
    Attribute, Criteria, Failure_Reject, Failure_Retry, Operator, Payload_Json, Priority, Target_Everyone, Target_Group, Target_User, Test,
    Value_Decimal, Value_Flag, Value_Integer, Value_Text,
)

HOUR_MS = 3_600_000

urgent_fee = 100


class Lifecycle(exports.Lifecycle):
    def describe(self):
        schema = {
            "type": "object",
            "additionalProperties": False,
            "properties": {"urgent_fee": {"type": "number", "minimum": 0, "default": 100}},
        }
        return Manifest(
            name="parcels",
            version="0.1.0",
            description="Notifies customers about their parcels",
            types=["parcel.*"],
            reads=Selection(
                attributes=["customer", "depot", "late", "test"],
                fields=["/fee", "/heavier_than", "/hours_late", "/number"],
                payload=True,
            ),
            config_schema=json.dumps(schema),
            options=[],
        )

    def configure(self, config):
        global urgent_fee
        config = json.loads(config)
        fee = config.pop("urgent_fee", 100)
        issues = [Issue(path, "is unknown; the only key is urgent_fee") for path in config]
        # In Python, True is an instance of int.
        if type(fee) not in (int, float) or fee < 0:
            issues.append(Issue("urgent_fee", "use a number of 0 or more"))
        if issues:
            raise Err(issues)
        urgent_fee = fee


def reporting(decide):
    """Log unexpected exceptions, which would otherwise be lost: a plugin has no standard error."""

    @functools.wraps(decide)
    def decide_and_report(self, event):
        try:
            return decide(self, event)
        except Err:
            raise
        except Exception:
            log.log(log.Level.ERROR, traceback.format_exc())
            raise

    return decide_and_report


class Filter(exports.Filter):
    @reporting
    def evaluate(self, event):
        attributes = attributes_of(event)
        if attributes.get("test") in (Value_Flag(True), Value_Text("true")):
            return Verdict_Drop("test event")
        if clock.now_ms() > event.time_ms + 7 * 24 * HOUR_MS:
            return Verdict_Drop("older than 7 days")
        late = number(attributes.get("/hours_late"))
        if late is not None and late >= 24:
            is_urgent_enough = event.priority in (Priority.HIGH, Priority.URGENT)
            return Verdict_Amend(Amendment(None if is_urgent_enough else Priority.HIGH, [Attribute("late", Value_Flag(True))], []))
        return Verdict_Keep()


class Router(exports.Router):
    @reporting
    def resolve(self, event):
        attributes = attributes_of(event)
        match event.type:
            case "parcel.moved":
                return [moved(event, attributes)]
            case "parcel.delivered":
                return [delivered(attributes)]
            case "parcel.held":
                return held(attributes)
            case "parcel.recalled":
                return [recalled(attributes)]
            case _:
                return []


def moved(event, attributes):
    customer, parcel = customer_of(attributes), number_of(attributes)
    place, stops = last_place(event.data)
    return route(
        [customer],
        priority=None if attributes.get("late") == Value_Flag(True) else Priority.LOW,
        ttl_ms=6 * HOUR_MS,
        collapse_key=f"parcel-{parcel}",
        event_name="parcel",
        body=json.dumps({"number": parcel, "place": place, "stops": stops}),
    )


def delivered(attributes):
    customer, parcel = customer_of(attributes), number_of(attributes)
    depot = text(attributes.get("depot"))
    targets = [customer, Target_Group(f"depot-{depot}")] if depot else [customer]
    return route(targets, collapse_key=f"parcel-{parcel}", event_name="parcel")


def held(attributes):
    customer = customer_of(attributes)
    fee = number(attributes.get("/fee"))
    if fee is None:
        raise Err(Failure_Retry("the fee is not known yet"))
    on_duty = [
        [Test("shift", Operator.EQUALS, [Value_Text("day")])],
        [
            Test("role", Operator.ONE_OF, [Value_Text("lead"), Value_Text("stand-in")]),
            Test("open", Operator.LESS, [Value_Integer(50)]),
        ],
    ]
    return [
        route([customer], priority=Priority.URGENT if fee >= urgent_fee else Priority.HIGH, event_name="parcel"),
        route([Target_Group("customs")], when=Criteria(on_duty), ttl_ms=12 * HOUR_MS, slot="customs"),
    ]


def recalled(attributes):
    parcel = number_of(attributes)
    weight = attributes.get("/heavier_than")
    log.log(log.Level.WARN, "a recall goes to everyone")
    if number(weight) is None:
        concerned = Test("parcels", Operator.GREATER, [Value_Integer(0)])
    else:
        concerned = Test("weight", Operator.GREATER, [weight])
    return route(
        [Target_Everyone()],
        when=Criteria([[Test("staff", Operator.PRESENT, [])], [concerned]]),
        priority=Priority.URGENT,
        ttl_ms=24 * HOUR_MS,
        collapse_key=f"recall-{parcel}",
        event_name="recall",
    )


def route(targets, when=None, priority=None, ttl_ms=None, collapse_key=None, event_name=None, body=None, slot=None):
    """Create a route with defaults, which the generated class lacks."""
    options = [Attribute("slot", Value_Text(slot))] if slot else []
    return Route(targets, when, priority, ttl_ms, collapse_key, event_name, body, options)


def attributes_of(event):
    """Return the attributes and fields by name."""
    return {attribute.name: attribute.value for attribute in event.attributes}


def customer_of(attributes):
    name = name_in(attributes.get("customer"))
    if not name:
        raise reject("the event has no customer; set the attribute customer to a text or an integer")
    return Target_User(name)


def number_of(attributes):
    number = name_in(attributes.get("/number"))
    if not number:
        raise reject("the payload has no parcel number; set /number to a text or an integer")
    return number


def last_place(data):
    """Return the location of the parcel and its number of stops.

    A JSON pointer cannot select the last element of a list, so the payload is parsed here.
    """
    payload = json.loads(data.value) if isinstance(data, Payload_Json) else None
    steps = payload.get("steps") if isinstance(payload, dict) else None
    last = steps[-1] if isinstance(steps, list) and steps else None
    place = last.get("place") if isinstance(last, dict) else None
    if not isinstance(place, str) or not place:
        raise reject("the payload has no place; set place in the last element of /steps")
    return place, len(steps)


def name_in(value):
    """Return a text, or an integer as text."""
    return str(value.value) if isinstance(value, Value_Integer) else text(value)


def text(value):
    return value.value if isinstance(value, Value_Text) else None


def number(value):
    return float(value.value) if isinstance(value, (Value_Integer, Value_Decimal)) else None


def reject(why):
    return Err(Failure_Reject(why))
