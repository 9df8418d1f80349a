//! Drops orders from the test system and raises the priority of large orders.

const std = @import("std");
const contract = @import("contract.zig");

const Event = contract.Event;
const Issue = contract.Issue;
const Manifest = contract.Manifest;
const Verdict = contract.Verdict;
const text = contract.text;

pub const panic = std.debug.FullPanic(contract.panic);

comptime {
    _ = contract;
}

/// The configuration.
const Config = struct {
    /// The minimum total of a large order.
    large: f64 = 1000,
};

var large: f64 = 1000;

/// Only what is listed here is available in `evaluate`.
pub fn describe() Manifest {
    // A list of constants is made with `comptime`; otherwise it would lie on the stack.
    return comptime .{
        .name = text("my-plugin"),
        .version = text("0.1.0"),
        .description = text("A filter for Pointsman"),
        .types = .of(&.{text("order.*")}),
        .reads = .{
            .attributes = .of(&.{text("test")}),
            .fields = .of(&.{text("/order/total")}),
            .payload = false,
        },
        .config_schema = .of(text(
            \\{"type":"object","additionalProperties":false,"properties":{"large":{"type":"number","exclusiveMinimum":0}}}
        )),
    };
}

/// Returns the problems of the configuration.
pub fn configure(json: []const u8) []const Issue {
    const config = std.json.parseFromSliceLeaky(Config, contract.allocator, json, .{}) catch
        return comptime &.{.{ .path = text(""), .message = text("use {\"large\": 500}") }};
    if (config.large <= 0)
        return comptime &.{.{ .path = text("large"), .message = text("give a number above 0") }};
    large = config.large;
    return &.{};
}

pub fn evaluate(event: Event) !Verdict {
    // Attributes of events added with XADD are always text.
    if (event.attribute("test")) |value| {
        const is_test = switch (value.kind) {
            .flag => value.payload.flag,
            .text => std.mem.eql(u8, value.payload.text.slice(), "true"),
            else => false,
        };
        if (is_test) return .drop("order from the test system");
    }
    const total = if (event.attribute("/order/total")) |value| value.asNumber() orelse 0 else 0;
    if (total < large) return .keep;
    return .amend(.{
        .priority = .of(.high),
        // Plugins called after this one see the attribute.
        .attributes = .of(comptime &.{.{ .name = text("desk"), .value = .ofText("large") }}),
    });
}
