//! The plugin contract pointsman:plugin@0.1.0 in Zig. An `extern struct` has the memory layout that
//! the canonical ABI prescribes for a record, and one of a case and an `extern union` that of a
//! variant, so the types of wit/types.wit and wit/plugin.wit are declared here as they lie in memory.
//!
//! The file with the plugin, which is the root, defines `describe`, `configure`, and `evaluate` (a
//! filter) or `resolve` (a router); this file exports them.

const std = @import("std");
const plugin = @import("root");

/// Memory of one call: everything in it is freed when the host has read the result.
pub const allocator = arena.allocator();
var arena = std.heap.ArenaAllocator.init(std.heap.wasm_allocator);

/// A list, and a string as a list of bytes: a pointer and a number of elements.
pub fn List(comptime T: type) type {
    return extern struct {
        pointer: [*]const T,
        len: usize,

        pub fn of(elements: []const T) @This() {
            return .{ .pointer = elements.ptr, .len = elements.len };
        }

        pub fn slice(list: @This()) []const T {
            return list.pointer[0..list.len];
        }
    };
}

pub const Text = List(u8);

pub fn text(bytes: []const u8) Text {
    return Text.of(bytes);
}

pub fn Option(comptime T: type) type {
    return extern struct {
        is_some: bool = false,
        value: T = undefined,

        pub fn of(value: T) @This() {
            return .{ .is_some = true, .value = value };
        }
    };
}

/// The outcome of a call.
fn Result(comptime T: type, comptime E: type) type {
    return extern struct {
        is_err: bool,
        payload: extern union { ok: T, err: E },
    };
}

pub const Priority = enum(u8) { low, normal, high, urgent };

pub const Value = extern struct {
    pub const Kind = enum(u8) { text, integer, decimal, flag };

    kind: Kind,
    payload: extern union { text: Text, integer: i64, decimal: f64, flag: bool },

    pub fn ofText(bytes: []const u8) Value {
        return .{ .kind = .text, .payload = .{ .text = text(bytes) } };
    }

    pub fn ofInteger(number: i64) Value {
        return .{ .kind = .integer, .payload = .{ .integer = number } };
    }

    pub fn ofFlag(flag: bool) Value {
        return .{ .kind = .flag, .payload = .{ .flag = flag } };
    }

    /// Null if the value is not a text.
    pub fn asText(value: Value) ?[]const u8 {
        return if (value.kind == .text) value.payload.text.slice() else null;
    }

    /// Null if the value is not a number.
    pub fn asNumber(value: Value) ?f64 {
        return switch (value.kind) {
            .integer => @floatFromInt(value.payload.integer),
            .decimal => value.payload.decimal,
            else => null,
        };
    }
};

pub const Attribute = extern struct { name: Text, value: Value };

/// An event. It is never in memory as a whole, so it is not an extern struct.
pub const Event = struct {
    pub const Payload = enum(u8) { none, json, text, binary };

    id: []const u8,
    source: []const u8,
    kind: []const u8,
    subject: ?[]const u8,
    /// Milliseconds since the Unix epoch.
    time_ms: u64,
    priority: Priority,
    attributes: []const Attribute,
    payload_kind: Payload,
    /// Empty if there is none.
    payload: []const u8,

    /// An attribute, or a payload field by its pointer; null if the event does not have it.
    pub fn attribute(event: Event, name: []const u8) ?Value {
        for (event.attributes) |a| {
            if (std.mem.eql(u8, a.name.slice(), name)) return a.value;
        }
        return null;
    }
};

pub const Operator = enum(u8) {
    equals,
    not_equals,
    one_of,
    contains,
    prefix,
    less,
    greater,
    present,
    absent,
    not_one_of,
    not_contains,
    at_least,
    at_most,
    suffix,
};

pub const Test = extern struct {
    attribute: Text,
    operator: Operator,
    values: List(Value) = .of(&.{}),
};

pub const Criteria = extern struct { any_of: List(List(Test)) };

pub const Target = extern struct {
    kind: enum(u8) { user, group, everyone },
    name: Text = undefined,

    pub fn user(id: []const u8) Target {
        return .{ .kind = .user, .name = text(id) };
    }

    pub fn group(name: []const u8) Target {
        return .{ .kind = .group, .name = text(name) };
    }
};

pub const Route = extern struct {
    targets: List(Target),
    when: Option(Criteria) = .{},
    priority: Option(Priority) = .{},
    ttl_ms: Option(u64) = .{},
    collapse_key: Option(Text) = .{},
    event_name: Option(Text) = .{},
    body: Option(Text) = .{},
    /// Further properties. The host knows `slot`, a text: the name of a notification of its own. It
    /// refuses an unknown name.
    options: List(Attribute) = .of(&.{}),
};

pub const Amendment = extern struct {
    priority: Option(Priority) = .{},
    attributes: List(Attribute) = .of(&.{}),
    /// Further properties; the host knows none.
    options: List(Attribute) = .of(&.{}),
};

pub const Verdict = extern struct {
    kind: enum(u8) { keep, drop, amend },
    payload: extern union { none: void, reason: Text, amendment: Amendment } = .{ .none = {} },

    pub const keep: Verdict = .{ .kind = .keep };

    pub fn drop(reason: []const u8) Verdict {
        return .{ .kind = .drop, .payload = .{ .reason = text(reason) } };
    }

    pub fn amend(amendment: Amendment) Verdict {
        return .{ .kind = .amend, .payload = .{ .amendment = amendment } };
    }
};

pub const Selection = extern struct { attributes: List(Text), fields: List(Text), payload: bool };

pub const Manifest = extern struct {
    name: Text,
    version: Text,
    description: Text,
    types: List(Text),
    reads: Selection,
    config_schema: Option(Text) = .{},
    /// Further properties; the host knows none.
    options: List(Attribute) = .of(&.{}),
};

pub const Issue = extern struct { path: Text, message: Text };

const Failure = extern struct { kind: enum(u8) { reject, retry }, reason: Text };

var failure: Failure = undefined;

/// The error of a plugin that can never decide about this event.
pub fn reject(reason: []const u8) error{Undecided} {
    failure = .{ .kind = .reject, .reason = text(reason) };
    return error.Undecided;
}

/// The error of a plugin that cannot decide about this event now.
pub fn retry(reason: []const u8) error{Undecided} {
    failure = .{ .kind = .retry, .reason = text(reason) };
    return error.Undecided;
}

pub const Level = enum(u32) { trace, debug, info, warn, @"error" };

pub fn log(level: Level, message: []const u8) void {
    host.log(level, message.ptr, message.len);
}

/// Milliseconds since the Unix epoch; the time stands still during a call.
pub fn nowMs() u64 {
    return host.now();
}

const host = struct {
    const log = @extern(*const fn (Level, [*]const u8, usize) callconv(.c) void, .{
        .name = "log",
        .library_name = "pointsman:plugin/log@0.1.0",
    });
    const now = @extern(*const fn () callconv(.c) u64, .{
        .name = "now-ms",
        .library_name = "pointsman:plugin/clock@0.1.0",
    });
};

/// The panic handler: the message goes to the log, from where the host takes it as the reason.
pub fn panic(message: []const u8, _: ?usize) noreturn {
    log(.@"error", message);
    @trap();
}

/// The host calls it for each part of the arguments of a call.
fn realloc(old: [*]u8, old_len: usize, alignment: usize, len: usize) callconv(.c) [*]u8 {
    if (len == 0) return @ptrFromInt(alignment);
    // The largest alignment of a type in the contract.
    const memory = allocator.alignedAlloc(u8, .@"8", len) catch @panic("out of memory");
    @memcpy(memory[0..old_len], old[0..old_len]);
    return memory.ptr;
}

/// A result in memory that lives until the host has read it.
fn answer(value: anytype) *const @TypeOf(value) {
    const memory = allocator.create(@TypeOf(value)) catch @panic("out of memory");
    memory.* = value;
    return memory;
}

/// The host calls it for each call whose result it has read.
fn release(_: *const anyopaque) callconv(.c) void {
    _ = arena.reset(.retain_capacity);
}

fn describe() callconv(.c) *const Manifest {
    return answer(plugin.describe());
}

fn configure(config: [*]const u8, len: usize) callconv(.c) *const Result(void, List(Issue)) {
    const issues: []const Issue = plugin.configure(config[0..len]);
    return answer(Result(void, List(Issue)){
        .is_err = issues.len > 0,
        .payload = if (issues.len > 0) .{ .err = .of(issues) } else .{ .ok = {} },
    });
}

/// The export that passes an event to `decide`: its fields, flattened, are the parameters.
fn exported(comptime T: type, comptime decide: fn (Event) anyerror!T) type {
    return struct {
        fn call(
            id: [*]const u8,
            id_len: usize,
            source: [*]const u8,
            source_len: usize,
            kind: [*]const u8,
            kind_len: usize,
            has_subject: u32,
            subject: [*]const u8,
            subject_len: usize,
            time_ms: u64,
            priority: u32,
            attributes: [*]const Attribute,
            attributes_len: usize,
            payload_kind: u32,
            payload: [*]const u8,
            payload_len: usize,
        ) callconv(.c) *const Result(T, Failure) {
            const decided = decide(.{
                .id = id[0..id_len],
                .source = source[0..source_len],
                .kind = kind[0..kind_len],
                .subject = if (has_subject != 0) subject[0..subject_len] else null,
                .time_ms = time_ms,
                .priority = @fromBackingInt(@intCast(priority)),
                .attributes = attributes[0..attributes_len],
                .payload_kind = @fromBackingInt(@intCast(payload_kind)),
                .payload = if (payload_kind != 0) payload[0..payload_len] else "",
            });
            return answer(Result(T, Failure){
                .is_err = std.meta.isError(decided),
                .payload = if (decided) |ok| .{ .ok = ok } else |err| switch (err) {
                    error.Undecided => .{ .err = failure },
                    else => @panic(@errorName(err)),
                },
            });
        }
    };
}

fn exportAs(comptime function: anytype, comptime name: []const u8) void {
    @export(function, .{ .name = "pointsman:plugin/" ++ name });
    @export(&release, .{ .name = "cabi_post_pointsman:plugin/" ++ name });
}

fn resolved(event: Event) anyerror!List(Route) {
    return .of(try plugin.resolve(event));
}

comptime {
    @export(&realloc, .{ .name = "cabi_realloc" });
    exportAs(&describe, "lifecycle@0.1.0#describe");
    exportAs(&configure, "lifecycle@0.1.0#configure");
    if (@hasDecl(plugin, "evaluate"))
        exportAs(&exported(Verdict, plugin.evaluate).call, "filter@0.1.0#evaluate");
    if (@hasDecl(plugin, "resolve"))
        exportAs(&exported(List(Route), resolved).call, "router@0.1.0#resolve");
}
