//! Notifies customers about their parcels: a filter and a router. ../README.md describes its
//! decisions.

const std = @import("std");
const contract = @import("contract.zig");

const Amendment = contract.Amendment;
const Attribute = contract.Attribute;
const Event = contract.Event;
const Issue = contract.Issue;
const List = contract.List;
const Manifest = contract.Manifest;
const Route = contract.Route;
const Target = contract.Target;
const Test = contract.Test;
const Text = contract.Text;
const Value = contract.Value;
const Verdict = contract.Verdict;
const text = contract.text;

pub const panic = std.debug.FullPanic(contract.panic);

comptime {
    _ = contract;
}

const hour_ms: u64 = 3_600_000;

var urgent_fee: f64 = 100;

// A list of constants is made with `comptime`; otherwise it would lie on the stack of the function.

pub fn describe() Manifest {
    return comptime .{
        .name = text("parcels"),
        .version = text("0.1.0"),
        .description = text("Notifies customers about their parcels"),
        .types = .of(&.{text("parcel.*")}),
        .reads = .{
            .attributes = .of(&.{ text("customer"), text("depot"), text("late"), text("test") }),
            .fields = .of(&.{ text("/fee"), text("/heavier_than"), text("/hours_late"), text("/number") }),
            .payload = true,
        },
        .config_schema = .of(text(
            \\{"type":"object","additionalProperties":false,
            \\"properties":{"urgent_fee":{"type":"number","minimum":0,"default":100}}}
        )),
    };
}

/// Returns the problems of the configuration.
pub fn configure(config: []const u8) []const Issue {
    urgent_fee = 100;
    var issues: std.ArrayList(Issue) = .empty;
    const object = parse(config).object;
    for (object.keys(), object.values()) |key, value| {
        if (!std.mem.eql(u8, key, "urgent_fee")) {
            issues.append(contract.allocator, .{ .path = text(key), .message = text("is unknown; the only key is urgent_fee") }) catch @panic("out of memory");
            continue;
        }
        const fee: f64 = switch (value) {
            .integer => |integer| @floatFromInt(integer),
            .float => |float| float,
            else => -1,
        };
        if (fee >= 0) {
            urgent_fee = fee;
        } else {
            issues.append(contract.allocator, .{ .path = text(key), .message = text("use a number of 0 or more") }) catch @panic("out of memory");
        }
    }
    return issues.items;
}

pub fn evaluate(event: Event) !Verdict {
    if (event.attribute("test")) |value| {
        const is_true = if (value.asText()) |word| std.mem.eql(u8, word, "true") else isTrue(value);
        if (is_true) return .drop("test event");
    }
    if (contract.nowMs() > event.time_ms + 7 * 24 * hour_ms) return .drop("older than 7 days");
    if ((number(event, "/hours_late") orelse 0) >= 24) {
        const is_urgent_enough = event.priority == .high or event.priority == .urgent;
        return .amend(.{
            .priority = if (is_urgent_enough) .{} else .of(.high),
            .attributes = .of(comptime &.{.{ .name = text("late"), .value = .ofFlag(true) }}),
        });
    }
    return .keep;
}

pub fn resolve(event: Event) ![]const Route {
    const handlers = std.StaticStringMap(*const fn (Event) anyerror![]const Route).initComptime(.{
        .{ "parcel.moved", moved },
        .{ "parcel.delivered", delivered },
        .{ "parcel.held", held },
        .{ "parcel.recalled", recalled },
    });
    const handler = handlers.get(event.kind) orelse return &.{};
    return handler(event);
}

fn moved(event: Event) anyerror![]const Route {
    const customer = try customerOf(event);
    const parcel = try parcelOf(event);
    const place, const stops = try lastPlace(event);
    const body = try std.json.Stringify.valueAlloc(
        contract.allocator,
        .{ .number = parcel, .place = place, .stops = stops },
        .{},
    );
    const is_late = if (event.attribute("late")) |late| isTrue(late) else false;
    return routes(&.{.{
        .targets = try targets(&.{customer}),
        .priority = if (is_late) .{} else .of(.low),
        .ttl_ms = .of(6 * hour_ms),
        .collapse_key = .of(try print("parcel-{s}", .{parcel})),
        .event_name = .of(text("parcel")),
        .body = .of(text(body)),
    }});
}

fn delivered(event: Event) anyerror![]const Route {
    const customer = try customerOf(event);
    const parcel = try parcelOf(event);
    const depot = if (event.attribute("depot")) |depot| depot.asText() orelse "" else "";
    const to = if (depot.len > 0)
        try targets(&.{ customer, .{ .kind = .group, .name = try print("depot-{s}", .{depot}) } })
    else
        try targets(&.{customer});
    return routes(&.{.{
        .targets = to,
        .collapse_key = .of(try print("parcel-{s}", .{parcel})),
        .event_name = .of(text("parcel")),
    }});
}

fn held(event: Event) anyerror![]const Route {
    const customer = try customerOf(event);
    const fee = number(event, "/fee") orelse return contract.retry("the fee is not known yet");
    const on_duty = comptime &[_]List(Test){
        .of(&.{.{ .attribute = text("shift"), .operator = .equals, .values = .of(&.{.ofText("day")}) }}),
        .of(&.{
            .{ .attribute = text("role"), .operator = .one_of, .values = .of(&.{ .ofText("lead"), .ofText("stand-in") }) },
            .{ .attribute = text("open"), .operator = .less, .values = .of(&.{.ofInteger(50)}) },
        }),
    };
    return routes(&.{
        .{
            .targets = try targets(&.{customer}),
            .priority = .of(if (fee >= urgent_fee) .urgent else .high),
            .event_name = .of(text("parcel")),
        },
        .{
            .targets = .of(comptime &.{.group("customs")}),
            .when = .of(.{ .any_of = .of(on_duty) }),
            .ttl_ms = .of(12 * hour_ms),
            .options = .of(comptime &.{.{ .name = text("slot"), .value = .ofText("customs") }}),
        },
    });
}

fn recalled(event: Event) anyerror![]const Route {
    const parcel = try parcelOf(event);
    contract.log(.warn, "a recall goes to everyone");
    const weight = event.attribute("/heavier_than") orelse Value.ofFlag(false);
    const concerned: Test = if (weight.asNumber() != null)
        .{ .attribute = text("weight"), .operator = .greater, .values = .of(try contract.allocator.dupe(Value, &.{weight})) }
    else
        .{ .attribute = text("parcels"), .operator = .greater, .values = .of(comptime &.{.ofInteger(0)}) };
    const clauses = try contract.allocator.dupe(List(Test), &.{
        .of(comptime &.{.{ .attribute = text("staff"), .operator = .present }}),
        .of(try contract.allocator.dupe(Test, &.{concerned})),
    });
    return routes(&.{.{
        .targets = .of(comptime &.{.{ .kind = .everyone }}),
        .when = .of(.{ .any_of = .of(clauses) }),
        .priority = .of(.urgent),
        .ttl_ms = .of(24 * hour_ms),
        .collapse_key = .of(try print("recall-{s}", .{parcel})),
        .event_name = .of(text("recall")),
    }});
}

/// Copies routes into memory that outlives the function.
fn routes(list: []const Route) ![]const Route {
    return contract.allocator.dupe(Route, list);
}

fn targets(list: []const Target) !List(Target) {
    return .of(try contract.allocator.dupe(Target, list));
}

fn print(comptime format: []const u8, arguments: anytype) !Text {
    return text(try std.fmt.allocPrint(contract.allocator, format, arguments));
}

fn customerOf(event: Event) !Target {
    const name = try nameIn(event, "customer");
    if (name.len == 0) return contract.reject("the event has no customer; set the attribute customer to a text or an integer");
    return .user(name);
}

fn parcelOf(event: Event) ![]const u8 {
    const name = try nameIn(event, "/number");
    if (name.len == 0) return contract.reject("the payload has no parcel number; set /number to a text or an integer");
    return name;
}

/// Returns the location of the parcel and its number of stops. A JSON pointer cannot select the last
/// element of a list, so the payload is parsed here.
fn lastPlace(event: Event) !struct { []const u8, usize } {
    if (event.payload_kind == .json) found: {
        const payload = parse(event.payload);
        const object = if (payload == .object) payload.object else break :found;
        const steps = object.get("steps") orelse break :found;
        if (steps != .array or steps.array.items.len == 0) break :found;
        const last = steps.array.items[steps.array.items.len - 1];
        const place = if (last == .object) last.object.get("place") orelse break :found else break :found;
        if (place != .string or place.string.len == 0) break :found;
        return .{ place.string, steps.array.items.len };
    }
    return contract.reject("the payload has no place; set place in the last element of /steps");
}

/// Parses JSON, which the host has checked.
fn parse(json: []const u8) std.json.Value {
    const options: std.json.ParseOptions = .{ .duplicate_field_behavior = .use_last };
    return std.json.parseFromSliceLeaky(std.json.Value, contract.allocator, json, options) catch @panic("invalid JSON");
}

/// Returns a text, or an integer as text; empty if there is neither.
fn nameIn(event: Event, attribute: []const u8) ![]const u8 {
    const value = event.attribute(attribute) orelse return "";
    if (value.kind == .integer) return std.fmt.allocPrint(contract.allocator, "{d}", .{value.payload.integer});
    return value.asText() orelse "";
}

fn number(event: Event, field: []const u8) ?f64 {
    return if (event.attribute(field)) |value| value.asNumber() else null;
}

fn isTrue(value: Value) bool {
    return value.kind == .flag and value.payload.flag;
}
