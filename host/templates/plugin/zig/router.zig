//! Routes order events to the order's owner and to the group of its region.

const std = @import("std");
const contract = @import("contract.zig");

const Event = contract.Event;
const Issue = contract.Issue;
const Manifest = contract.Manifest;
const Route = contract.Route;
const Target = contract.Target;
const text = contract.text;

pub const panic = std.debug.FullPanic(contract.panic);

comptime {
    _ = contract;
}

/// The configuration.
const Config = struct {
    /// The event attribute that names the owner of the order.
    owner: []const u8 = "owner",
};

/// Copied out of the memory of the call.
var owner: []const u8 = "owner";

/// Only what is listed here is available in `resolve`.
pub fn describe() Manifest {
    const attributes = contract.allocator.dupe(contract.Text, &.{text(owner)}) catch @panic("out of memory");
    return .{
        .name = text("my-plugin"),
        .version = text("0.1.0"),
        .description = text("A router for Pointsman"),
        // A list of constants is made with `comptime`; otherwise it would lie on the stack.
        .types = .of(comptime &.{text("order.*")}),
        .reads = .{
            .attributes = .of(attributes),
            .fields = .of(comptime &.{text("/order/region")}),
            .payload = false,
        },
        .config_schema = .of(text(
            \\{"type":"object","additionalProperties":false,"properties":{"owner":{"type":"string","minLength":1}}}
        )),
    };
}

/// Returns the problems of the configuration.
pub fn configure(json: []const u8) []const Issue {
    const config = std.json.parseFromSliceLeaky(Config, contract.allocator, json, .{}) catch
        return comptime &.{.{ .path = text(""), .message = text("use {\"owner\": \"customer\"}") }};
    if (config.owner.len == 0)
        return comptime &.{.{ .path = text("owner"), .message = text("name an attribute, such as customer") }};
    owner = std.heap.wasm_allocator.dupe(u8, config.owner) catch @panic("out of memory");
    return &.{};
}

pub fn resolve(event: Event) ![]const Route {
    var routes: std.ArrayList(Route) = .empty;
    if (textOf(event, owner)) |id| try routes.append(contract.allocator, try to(.user(id)));
    if (textOf(event, "/order/region")) |region| {
        const name = try std.fmt.allocPrint(contract.allocator, "region-{s}", .{region});
        try routes.append(contract.allocator, try to(.group(name)));
    }
    return routes.items;
}

fn to(target: Target) !Route {
    return .{ .targets = .of(try contract.allocator.dupe(Target, &.{target})) };
}

fn textOf(event: Event, name: []const u8) ?[]const u8 {
    return if (event.attribute(name)) |value| value.asText() else null;
}
