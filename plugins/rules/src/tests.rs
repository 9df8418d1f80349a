//! Tests of the plugin as the host calls it: configured from JSON, and passed only what its
//! interest includes.

use pointsman_plugin::testing::{EventBuilder, configure, event, logged};
use pointsman_plugin::{Criteria, Operator, Payload, Target, Test, Value};
use serde_json::{Value as Json, json};

use super::*;

/// The routes for an event as the host would pass it; none if the host would not call the plugin.
fn resolve(rules: &Json, event: EventBuilder) -> Vec<Route> {
    let plugin: Rules = configure(json!({ "rules": rules })).unwrap();
    event
        .seen_by(&plugin)
        .map_or(Vec::new(), |event| plugin.resolve(&event).unwrap())
}

/// Formats users as they are, groups with a leading `@` and everyone as `*`; also returns the lines
/// that the plugin logged.
fn targets(to: Json, event: EventBuilder) -> (Vec<String>, String) {
    let routes = resolve(&json!([{ "to": to }]), event);
    let written = |target: &Target| match target {
        Target::User(user) => user.clone(),
        Target::Group(group) => format!("@{group}"),
        Target::Everyone => "*".into(),
    };
    let told = logged()
        .into_iter()
        .map(|(level, line)| format!("{level:?} {line}"))
        .collect::<Vec<_>>()
        .join("\n");
    (
        routes
            .iter()
            .flat_map(|route| route.targets.iter().map(written))
            .collect(),
        told,
    )
}

#[test]
fn without_rules_no_one_is_addressed() {
    assert_eq!(resolve(&json!([]), event("t").attribute("user", "42")), []);
    let plugin: Rules = configure(json!({})).unwrap();
    assert_eq!(plugin.interest(), Interest::in_every_type());
}

#[test]
fn a_rule_can_set_every_part_of_a_route() {
    let rules = json!([{
        "name": "large", "match": {"type": "order.*", "payload": {"/total": {"at_least": 100}}},
        "to": {"user": "{/owner}", "users": ["a", "b"], "group": "ops", "groups": "sales-{region}", "everyone": true},
        "when": {"plan": "pro"}, "priority": "urgent", "ttl": "2m", "collapse": "order-{/id}", "event_name": "order", "body": {"n": "{/id}"}
    }]);
    let order = |total: i64| {
        event("order.paid")
            .attribute("region", "eu")
            .json(&json!({"total": total, "owner": 42, "id": "7"}))
    };
    assert_eq!(resolve(&rules, order(99)), []);
    let targets = ["42", "a", "b"]
        .map(|user| Target::User(user.into()))
        .into_iter();
    let targets = targets
        .chain(["ops", "sales-eu"].map(|group| Target::Group(group.into())))
        .chain([Target::Everyone]);
    let route = Route::to(targets.collect::<Vec<_>>())
        .when([Test::new("plan", Operator::Equals, [Value::from("pro")])])
        .priority(Priority::Urgent)
        .ttl_ms(120_000)
        .collapse_key("order-7")
        .event_name("order")
        .body(&json!({"n": "7"}));
    assert_eq!(resolve(&rules, order(100)), [route]);
}

#[test]
fn every_rule_that_holds_adds_a_route_until_one_stops() {
    let rules = json!([
        {"match": {"type": "a"}, "to": {"user": "1"}},
        {"match": {"type": "b"}, "to": {"user": "2"}, "stop": true},
        {"match": {"attributes": {"test": true}}, "stop": true},
        {"match": {"type": "c"}, "to": {"user": "{/gone}"}, "stop": true},
        {"to": {"user": "3"}}
    ]);
    let to = |users: &[&str]| {
        users
            .iter()
            .map(|user| Route::to_user(*user))
            .collect::<Vec<_>>()
    };
    assert_eq!(resolve(&rules, event("a")), to(&["1", "3"]));
    assert_eq!(resolve(&rules, event("b")), to(&["2"]));
    assert_eq!(
        resolve(&rules, event("a").attribute("test", "true")),
        to(&["1"])
    );
    assert_eq!(
        resolve(&rules, event("c")),
        [],
        "a rule that holds stops the list even if it addresses no one"
    );
}

#[test]
fn a_list_yields_a_target_for_each_element() {
    let with = |value: Json| event("t").json(&json!({"l": value, "m": ["x"]}));
    for (to, value, expect) in [
        (
            json!({"user": "{/l}"}),
            json!(["a", "b", 7]),
            vec!["a", "b", "7"],
        ),
        (
            json!({"groups": ["team-{/l}-x"]}),
            json!(["a", "b"]),
            vec!["@team-a-x", "@team-b-x"],
        ),
        (json!({"user": "{/l}"}), json!([]), vec![]),
        (json!({"user": "{/l}"}), json!("a"), vec!["a"]),
        (json!({"user": "{/l}"}), json!(7), vec!["7"]),
        (json!({"user": "[{/l}]"}), json!("a"), vec!["[a]"]),
    ] {
        assert_eq!(
            targets(to.clone(), with(value.clone())),
            (
                expect.into_iter().map(str::to_owned).collect(),
                String::new()
            ),
            "{to} {value}"
        );
    }
}

#[test]
fn a_missing_value_or_invalid_name_yields_no_target_and_is_logged_at_debug() {
    let long = "x".repeat(257);
    for (template, value, expect, told) in [
        (
            "{/gone}",
            json!(1),
            vec![],
            "'{/gone}' yields no target: the event has no /gone",
        ),
        (
            "u-{/l}",
            json!(null),
            vec![],
            "'u-{/l}' yields no target: the event has no /l",
        ),
        ("u-{/l}", json!(""), vec![], "/l is empty"),
        (
            "{/l}",
            json!(1.5),
            vec![],
            "/l is 1.5, neither a text nor an integer",
        ),
        ("{/l}", json!(true), vec![], "/l is true, neither"),
        (
            "{/l}",
            json!("a\nb"),
            vec![],
            "the name contains a control character",
        ),
        (
            "{/l}",
            json!(long),
            vec![],
            "the name has 257 bytes, but the limit is 256",
        ),
        (
            "{/l}",
            json!(["a", null, "b", "", {"c": 1}]),
            vec!["a", "b"],
            "'{/l}' yields fewer targets: /l has an element that is neither",
        ),
        (
            "{/l}",
            json!(["a", "b\u{85}"]),
            vec!["a"],
            "the name contains a control character",
        ),
        (
            "{/l}{/l}",
            json!(["a"]),
            vec![],
            "/l is a second list in the template",
        ),
    ] {
        let (names, log) = targets(
            json!({"user": template}),
            event("t").json(&json!({"l": value})),
        );
        assert_eq!(names, expect, "{template} {value}");
        assert!(
            log.contains("Debug rules[0]: ") && log.contains(told),
            "{template} {value} logged: {log}"
        );
    }
    let rules =
        json!([{"name": "mine", "to": {"user": "{/gone}", "group": "ops"}, "collapse": "{/gone}"}]);
    assert_eq!(resolve(&rules, event("t")), [Route::to_group("ops")]);
    let told: Vec<String> = logged().into_iter().map(|(_, line)| line).collect();
    assert_eq!(
        told,
        [
            "rules[0] (mine): '{/gone}' yields no target: the event has no /gone",
            "rules[0] (mine): the notification has no collapse key: the event has no /gone"
        ]
    );
}

#[test]
fn conditions_on_recipients_use_values_of_the_event() {
    let when = |when: Json, event: EventBuilder| {
        resolve(&json!([{"to": {"everyone": true}, "when": when}]), event)
            .pop()
            .and_then(|route| route.when)
    };
    let test = |name: &str, operator, values: Vec<Value>| Test::new(name, operator, values);
    let all = json!({
        "a": "x", "b": ["y", 1, true], "c": {"not_equals": 1.5, "present": true}, "d": {"contains": "t"}, "e": {"prefix": "{{p"}, "f": {"less": 5, "greater": 1}
    });
    let expect = vec![
        test("a", Operator::Equals, vec!["x".into()]),
        test(
            "b",
            Operator::OneOf,
            vec!["y".into(), 1.into(), true.into()],
        ),
        test("c", Operator::NotEquals, vec![1.5.into()]),
        test("c", Operator::Present, vec![]),
        test("d", Operator::Contains, vec!["t".into()]),
        test("e", Operator::Prefix, vec!["{p".into()]),
        test("f", Operator::Less, vec![5.into()]),
        test("f", Operator::Greater, vec![1.into()]),
    ];
    assert_eq!(
        when(all, event("t")),
        Some(Criteria {
            any_of: vec![expect]
        })
    );

    let either = json!([{"region": "{/r}"}, {"team": "{/t}-{type}"}]);
    let data = |data: Json| event("x").json(&data);
    let region = vec![test("region", Operator::Equals, vec![7.into()])];
    let team = vec![test("team", Operator::Equals, vec!["a-x".into()])];
    assert_eq!(
        when(either.clone(), data(json!({"r": 7, "t": "a"}))),
        Some(Criteria {
            any_of: vec![region, team.clone()]
        })
    );
    assert_eq!(
        when(either.clone(), data(json!({"t": "a"}))),
        Some(Criteria { any_of: vec![team] })
    );
    assert_eq!(
        resolve(
            &json!([{"to": {"everyone": true}, "when": either}]),
            data(json!({}))
        ),
        [],
        "the condition would hold for no one"
    );

    let above = |event| {
        when(json!({"age": {"greater": "{age}"}}), event)
            .map(|criteria| criteria.any_of[0][0].values[0].clone())
    };
    assert_eq!(above(event("t").attribute("age", 30)), Some(30.into()));
    assert_eq!(
        above(event("t").attribute("age", "30")),
        Some(30.into()),
        "an attribute may arrive as text"
    );
    assert_eq!(above(event("t").attribute("age", "old")), None);
    assert_eq!(
        when(
            json!({"age": {"greater": "{/age}"}}),
            data(json!({"age": "30"}))
        ),
        None,
        "a field keeps its JSON type"
    );
    let prefixed = when(json!({"team": {"prefix": "{/n}"}}), data(json!({"n": 4}))).unwrap();
    assert_eq!(prefixed.any_of[0][0].values, ["4".into()]);
}

#[test]
fn a_body_keeps_the_types_of_its_values() {
    let body = json!({
        "text": "{/who} has {/n}{/gone} of {n}", "n": "{/n}", "list": ["{/list}", "{/text}", 1, null, true, 2.5], "object": {"o": "{/o}"},
        "attributes": ["{n}", "{d}", "{f}", "{gone}", "{type}", "{subject}"], "gone": "{/gone}", "brace": "{{}}"
    });
    let event = event("t")
        .attribute("n", 7)
        .attribute("d", 0.5)
        .attribute("f", true)
        .json(&json!({"who": "Ann", "n": 12.5, "list": ["a", 1], "text": "[1]", "o": {"x": null}}));
    let route = resolve(&json!([{"to": {"user": "a"}, "body": body}]), event)
        .pop()
        .unwrap();
    let expect = json!({
        "text": "Ann has 12.5 of 7", "n": 12.5, "list": [["a", 1], "[1]", 1, null, true, 2.5], "object": {"o": {"x": null}},
        "attributes": [7, 0.5, true, null, "t", null], "gone": null, "brace": "{}"
    });
    assert_eq!(
        serde_json::from_str::<Json>(&route.body.unwrap()).unwrap(),
        expect
    );
}

/// Converted to decimals they would be different numbers.
#[test]
fn a_body_keeps_the_digits_of_numbers_as_they_were_written() {
    let payload = r#" { "id": 123456789012345678901234567890, "price": 1.10, "lines": [{"n": 18446744073709551616 }, 1e400],
        "a/b": {"~": -0}, "a": 1, "a": 2 } "#;
    let mut event = event("t").build();
    event.data = Payload::Json(payload.to_owned());
    let body = json!([
        "{/id}",
        "{/price}",
        "{/lines}",
        "{/lines/0/n}",
        "{/lines/1}",
        "{/lines/2}",
        "{/lines/01}",
        "{/lines/n}",
        "{/a~1b/~0}",
        "{/a}",
        "{/id/x}"
    ]);
    let rules: Rules =
        configure(json!({ "rules": [{"to": {"user": "a"}, "body": body}] })).unwrap();
    let route = rules.resolve(&event).unwrap().pop().unwrap();
    let expect = r#"[123456789012345678901234567890,1.10,[{"n": 18446744073709551616 }, 1e400],18446744073709551616,1e400,null,null,null,-0,2,null]"#;
    assert_eq!(route.body.unwrap(), expect);
}

#[test]
fn the_interest_covers_exactly_the_values_that_the_rules_read() {
    let interest = |rules: Json| {
        configure::<Rules>(json!({ "rules": rules }))
            .unwrap()
            .interest()
    };
    let rules = json!([
        {"match": {"type": "a", "attributes": {"x": 1}}, "to": {"user": "{/u}", "group": "{g}"}, "when": {"r": "{/r}"}, "collapse": "{subject}-{/c}",
         "body": "of {/b} and {x}"},
        {"match": {"type": "b", "payload": {"/p": 1}}, "stop": true}
    ]);
    assert_eq!(
        interest(rules),
        Interest::in_types(["a", "b"])
            .attributes(["x", "g"])
            .fields(["/p", "/u", "/c", "/r", "/b"])
    );
    let whole = interest(json!([{"to": {"user": "a"}, "body": {"deep": ["{/b}"]}}]));
    assert_eq!(
        whole,
        Interest::in_every_type().payload(),
        "a body that copies a value verbatim needs the payload"
    );
    let plugin: Rules = configure(json!({"rules": [{"to": {"user": "{/u}"}}]})).unwrap();
    assert_eq!(
        event("t")
            .json(&json!({"u": "a", "secret": 1}))
            .seen_by(&plugin)
            .unwrap()
            .data,
        Payload::None
    );
}

#[test]
fn a_mistake_is_reported_with_its_location_and_the_fix() {
    let to = json!({"user": "a"});
    let many: Vec<Json> = (0..257).map(|n| json!({format!("a{n}"): 1})).collect();
    for (rule, path, fix) in [
        (
            json!({}),
            "",
            "addresses no one; add targets, such as to = { user",
        ),
        (
            json!({"stop": true, "priority": "high"}),
            "",
            "or set only stop = true",
        ),
        (
            json!({"to": {}}),
            ".to",
            "set user, users, group, groups or everyone = true",
        ),
        (
            json!({"to": {"everyone": false}}),
            ".to",
            "addresses no one",
        ),
        (
            json!({"to": {"usr": "a"}}),
            ".to.usr",
            "unknown field `usr`, expected one of `user`",
        ),
        (
            json!({"to": {"user": ""}}),
            ".to.user",
            "the name is empty; use 1 to 256 bytes",
        ),
        (
            json!({"to": {"users": ["a", "{/b"]}}),
            ".to.users[1]",
            "write {{ for a literal {",
        ),
        (
            json!({"to": {"users": []}}),
            ".to.users",
            "the list is empty",
        ),
        (
            json!({"to": {"user": "{customer.id}"}}),
            ".to.user",
            "'customer.id' is not a valid attribute name",
        ),
        (
            json!({"to": to, "match": {"all": [{"type": "a"}, {"payload": {"x": 1}}]}}),
            ".match.all[1].payload.x",
            "write '/x'",
        ),
        // Not two users and two groups, by the order of the keys.
        (
            json!({"to": ["ann", "bob", "carl", "dave"]}),
            ".to",
            "is a list; write a table with keys from user, users, group, groups and everyone",
        ),
        (
            json!(["large orders"]),
            "",
            "is a list; write a table with keys from name, match,",
        ),
        (
            json!({"to": to, "when": {}}),
            ".when",
            "is empty; add a test of a recipient attribute",
        ),
        (
            json!({"to": to, "when": [{"a": 1}, {"b": {}}]}),
            ".when[1].b",
            "set equals, one_of, contains",
        ),
        (
            json!({"to": to, "when": {"a": {"atleast": 1}}}),
            ".when.a.atleast",
            "unknown field `atleast`, expected one of `equals`",
        ),
        (
            json!({"to": to, "when": {"a": {"less": "x"}}}),
            ".when.a.less",
            "'x' is not valid here; use a number",
        ),
        (
            json!({"to": to, "when": {"a": {"prefix": 1}}}),
            ".when.a.prefix",
            "'1' is not valid here; use a text",
        ),
        (
            json!({"to": to, "when": {"a": {"present": false, "equals": 1}}}),
            ".when.a",
            "can never hold",
        ),
        (
            json!({"to": to, "when": {"a": {"absent": true, "present": true}}}),
            ".when.a",
            "can never hold",
        ),
        (json!({"to": to, "slot": ""}), ".slot", "the name is empty"),
        (
            json!({"to": to, "when": {"a": "{/b"}}),
            ".when.a",
            "has an unmatched {",
        ),
        (
            json!({"to": to, "when": many}),
            ".when",
            "has 257 tests, but the limit is 256",
        ),
        (
            json!({"to": to, "priority": "asap"}),
            ".priority",
            "use low, normal, high or urgent",
        ),
        (
            json!({"to": to, "ttl": "soon"}),
            ".ttl",
            "'soon' is not a valid time to live; use a number of seconds",
        ),
        (
            json!({"to": to, "ttl": 0}),
            ".ttl",
            "'0' is not a valid time to live",
        ),
        (
            json!({"to": to, "collapse": ""}),
            ".collapse",
            "the name is empty",
        ),
        (
            json!({"to": to, "event_name": "gap"}),
            ".event_name",
            "'gap' is reserved",
        ),
        (
            json!({"to": to, "event_name": "a\nb"}),
            ".event_name",
            "control character",
        ),
        (
            json!({"to": to, "body": {"a": ["x", "{"]}}),
            ".body.a[1]",
            "write {{",
        ),
        (
            json!({"to": to, "prio": 1}),
            ".prio",
            "unknown field `prio`",
        ),
    ] {
        let Err(issues) = configure::<Rules>(json!({"rules": [{"stop": true}, rule]})) else {
            panic!("{rule} was accepted")
        };
        assert!(
            issues[0].path == format!("rules[1]{path}") && issues[0].message.contains(fix),
            "{rule} gave {issues:?}"
        );
    }
    let Err(issues) = configure::<Rules>(json!({"rule": []})) else {
        panic!("an unknown name was accepted")
    };
    assert!(
        issues[0]
            .message
            .contains("unknown field `rule`, expected `rules`"),
        "{issues:?}"
    );
}

#[test]
fn the_schema_lists_every_configuration_key() {
    let schema = serde_json::to_value(schemars::schema_for!(Config)).unwrap();
    let of_rule = &schema["$defs"]["Rule"];
    assert_eq!(of_rule["additionalProperties"], json!(false));
    for key in [
        "name",
        "match",
        "to",
        "when",
        "priority",
        "ttl",
        "collapse",
        "event_name",
        "body",
        "stop",
    ] {
        assert!(
            of_rule["properties"][key].is_object() || of_rule["properties"][key].is_boolean(),
            "{key} is not in {of_rule}"
        );
    }
    let operators = &schema["$defs"]["Operators"]["properties"];
    for key in [
        "equals", "one_of", "matches", "at_least", "includes", "present",
    ] {
        assert!(!operators[key].is_null(), "{key} is not in {schema:#}");
    }
}
