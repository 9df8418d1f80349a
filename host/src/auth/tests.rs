//! Identities of requests and the configuration of keys.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use super::*;
use crate::delivery::recipients::Claims;
use crate::event::criteria::Attributes;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// In a year, in seconds since the Unix epoch.
static LATER: std::sync::LazyLock<u64> =
    std::sync::LazyLock::new(|| crate::clock::now_ms() / 1_000 + 365 * 24 * 3_600);

impl Auth {
    fn identify_now(&self, parts: &Parts) -> Result<StreamIdentity, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(self.stream_identity(parts))
    }
}

fn config() -> Config {
    Config {
        jwt_secret: Some(SECRET.into()),
        api_key: Some("publisher-key-0001".into()),
        cookie: Some("pointsman".into()),
        ..Config::default()
    }
}

fn token(claims: &serde_json::Value) -> String {
    signed("HS256", ring::hmac::HMAC_SHA256, claims)
}

fn signed(name: &str, hmac: ring::hmac::Algorithm, claims: &serde_json::Value) -> String {
    let header = serde_json::json!({ "alg": name, "typ": "JWT" });
    let [header, claims] =
        [&header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
    let message = format!("{header}.{claims}");
    let key = ring::hmac::Key::new(hmac, SECRET.as_bytes());
    let signature = ring::hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

fn request(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut builder = axum::http::Request::get(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

#[test]
fn the_user_comes_from_the_token_not_from_the_url() {
    let auth = Auth::new(&config(), &[]).unwrap();
    let bearer = format!(
        "Bearer {}",
        token(&serde_json::json!({ "sub": "ann", "exp": *LATER }))
    );
    let identity = auth
        .identify_now(&request(
            "/v1/stream?user=bob",
            &[("authorization", &bearer)],
        ))
        .unwrap();
    assert_eq!(
        (identity.reader.user.as_str(), identity.expiry),
        (
            "ann",
            Some(TokenExpiry {
                expires_ms: *LATER * 1000,
                ends_ms: (*LATER + 30) * 1000,
            })
        )
    );
    assert!(matches!(
        auth.identify_now(&request("/v1/stream?user=bob", &[])),
        Err(Error::Missing(_))
    ));

    let cookie = format!(
        "a=b; pointsman={}; c=d",
        token(&serde_json::json!({ "sub": "ann", "exp": *LATER }))
    );
    assert_eq!(
        auth.identify_now(&request("/v1/stream", &[("cookie", &cookie)]))
            .unwrap()
            .reader
            .user
            .as_str(),
        "ann"
    );
}

#[test]
fn groups_and_attributes_come_from_the_token() {
    let read = |config: &Config, claims: serde_json::Value| {
        let mut all = serde_json::json!({ "sub": "ann", "exp": *LATER });
        all.as_object_mut()
            .unwrap()
            .extend(claims.as_object().unwrap().clone());
        let bearer = format!("Bearer {}", token(&all));
        let identity = Auth::new(config, &[])
            .unwrap()
            .identify_now(&request("/", &[("authorization", &bearer)]));
        identity
            .map(|identity| identity.reader.claims)
            .map_err(|error| error.to_string())
    };
    let claims = serde_json::json!({ "groups": ["ops", "Ülm", "ops"], "attributes": { "plan": "pro", "age": 30, "beta": true } });
    let whole = read(&config(), claims.clone()).unwrap();
    assert_eq!(
        whole.groups.iter().map(Name::as_str).collect::<Vec<_>>(),
        ["ops", "Ülm"]
    );
    assert_eq!(
        serde_json::to_value(&whole.attributes).unwrap(),
        claims["attributes"]
    );
    assert_eq!(
        read(
            &config(),
            serde_json::json!({ "groups": null, "attributes": null })
        )
        .unwrap(),
        Claims::default()
    );

    let renamed = Config {
        groups_claim: "https://shop.example/roles".into(),
        attributes_claim: String::new(),
        ..config()
    };
    let claims = serde_json::json!({ "groups": 7, "https://shop.example/roles": ["staff"], "attributes": "x", "": ["y"] });
    let read_renamed = read(&renamed, claims).unwrap();
    assert_eq!(
        (read_renamed.groups.len(), read_renamed.attributes),
        (1, Attributes::default())
    );

    let many: Vec<_> = (0..257).map(|n| n.to_string()).collect();
    for (claims, expect) in [
        (
            serde_json::json!({ "groups": "ops" }),
            "claim 'groups' is not a list",
        ),
        (
            serde_json::json!({ "groups": [true] }),
            "a group that is not a string",
        ),
        (
            serde_json::json!({ "groups": ["a\nb"] }),
            "control character",
        ),
        (
            serde_json::json!({ "groups": [""] }),
            "a group that is empty",
        ),
        (serde_json::json!({ "groups": many }), "has 257 groups"),
        (
            serde_json::json!({ "attributes": ["plan"] }),
            "claim 'attributes' is not an object",
        ),
        (
            serde_json::json!({ "attributes": { "plan": {"name": "pro"} } }),
            "plan is not a string, number, boolean or list of these",
        ),
    ] {
        let error = read(&config(), claims.clone()).unwrap_err();
        assert!(error.contains(expect), "{claims} gave: {error}");
    }
}

#[test]
fn an_invalid_token_is_refused_with_the_reason() {
    let auth = Auth::new(
        &Config {
            audience: Some("shop".into()),
            ..config()
        },
        &[],
    )
    .unwrap();
    let check = |token: &str, expect: &str| {
        let error = auth
            .identify_now(&request(
                "/",
                &[("authorization", &format!("Bearer {token}"))],
            ))
            .unwrap_err()
            .to_string();
        assert!(error.contains(expect), "{token} gave: {error}");
    };
    let claims = |changed: serde_json::Value| {
        let mut all = serde_json::json!({ "sub": "ann", "exp": *LATER, "aud": "shop" });
        all.as_object_mut()
            .unwrap()
            .extend(changed.as_object().unwrap().clone());
        token(&all)
    };
    check("x.y.z", "not a valid token");
    check(&claims(serde_json::json!({ "exp": 1000 })), "expired");
    check(
        &claims(serde_json::json!({ "nbf": *LATER })),
        "not valid yet",
    );
    check(
        &claims(serde_json::json!({ "aud": "bank" })),
        "another audience",
    );
    check(
        &claims(serde_json::json!({ "sub": 4.5 })),
        "no claim 'sub' with a string or a whole number",
    );
    check(
        &claims(serde_json::json!({ "sub": "a\nb" })),
        "control character",
    );
    check(
        &token(&serde_json::json!({ "sub": "ann", "aud": "shop" })),
        "no readable claim 'exp'",
    );
    let (honest, other) = (
        claims(serde_json::json!({})),
        claims(serde_json::json!({ "sub": "bob" })),
    );
    let forged = format!(
        "{}.{}",
        other.rsplit_once('.').unwrap().0,
        honest.rsplit_once('.').unwrap().1
    );
    check(&forged, "signature");
    // {"alg":"none","typ":"JWT"}
    let body = claims(serde_json::json!({}))
        .split('.')
        .nth(1)
        .unwrap()
        .to_owned();
    check(
        &format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}."),
        "token",
    );
    let hs512 = signed(
        "HS512",
        ring::hmac::HMAC_SHA512,
        &serde_json::json!({ "sub": "ann", "exp": *LATER, "aud": "shop" }),
    );
    check(&hs512, "signed with HS512; this node accepts HS256");
    let distant = *LATER + 10 * 365 * 24 * 3_600;
    check(
        &claims(serde_json::json!({ "exp": distant })),
        "more than ten years",
    );
    check(&"a".repeat(70_000), "has 70000 bytes");
}

#[test]
fn a_whole_number_names_a_user() {
    let auth = Auth::new(&config(), &[]).unwrap();
    for (sub, user) in [
        (serde_json::json!(42), "42"),
        (serde_json::json!(-1), "-1"),
        (serde_json::json!(u64::MAX), "18446744073709551615"),
        (serde_json::json!("42"), "42"),
    ] {
        let bearer = format!(
            "Bearer {}",
            token(&serde_json::json!({ "sub": sub, "exp": *LATER }))
        );
        let identity = auth.identify_now(&request("/", &[("authorization", &bearer)]));
        assert_eq!(identity.unwrap().reader.user.as_str(), user);
    }
    for sub in [
        serde_json::json!(42.0),
        serde_json::json!(1e30),
        serde_json::json!(true),
        serde_json::json!(["42"]),
    ] {
        let bearer = format!(
            "Bearer {}",
            token(&serde_json::json!({ "sub": sub, "exp": *LATER }))
        );
        let identity = auth.identify_now(&request("/", &[("authorization", &bearer)]));
        assert!(identity.is_err(), "{sub}");
    }
}

#[test]
fn two_authorization_headers_are_refused_and_the_error_names_the_cookie() {
    let auth = Auth::new(&config(), &[]).unwrap();
    let bearer = format!(
        "Bearer {}",
        token(&serde_json::json!({ "sub": "ann", "exp": *LATER }))
    );
    let twice = [
        ("authorization", bearer.as_str()),
        ("authorization", "Bearer x"),
    ];
    let error = auth.identify_now(&request("/", &twice)).unwrap_err();
    assert!(error.to_string().contains("several Authorization"));
    assert!(auth.authorize_key(&request("/", &twice)).is_err());
    let error = auth.identify_now(&request("/", &[])).unwrap_err();
    assert!(error.to_string().contains("cookie 'pointsman'"), "{error}");
}

#[test]
fn only_the_configured_api_key_is_accepted() {
    let auth = Auth::new(&config(), &[]).unwrap();
    assert_eq!(
        auth.authorize_key(&request(
            "/",
            &[("authorization", "bearer publisher-key-0001")]
        )),
        Ok(())
    );
    assert!(matches!(
        auth.authorize_key(&request(
            "/",
            &[("authorization", "Bearer publisher-key-0002")]
        )),
        Err(Error::Invalid(_))
    ));
    assert!(matches!(
        auth.authorize_key(&request("/", &[])),
        Err(Error::Missing(_))
    ));
    let keyless = Auth::new(
        &Config {
            api_key: None,
            ..config()
        },
        &[],
    )
    .unwrap();
    assert!(matches!(
        keyless.authorize_key(&request("/", &[("authorization", "Bearer x")])),
        Err(Error::Unavailable { .. })
    ));
}

#[test]
fn dev_mode_trusts_the_url_but_listens_on_loopback_only() {
    let dev = Config {
        dev: true,
        ..Config::default()
    };
    let auth = Auth::new(
        &dev,
        &[
            "127.0.0.1:8080".parse().unwrap(),
            "[::1]:1".parse().unwrap(),
        ],
    )
    .unwrap();
    assert_eq!(
        auth.identify_now(&request("/v1/stream?user=%C3%9Clrike", &[]))
            .unwrap()
            .reader
            .user
            .as_str(),
        "Ülrike"
    );
    assert!(
        auth.identify_now(&request("/v1/stream?user=a%0Ab", &[]))
            .is_err()
    );
    assert!(auth.identify_now(&request("/v1/stream", &[])).is_err());
    assert_eq!(auth.authorize_key(&request("/", &[])), Ok(()));
    let (key, text) = Auth::new(&dev, &["0.0.0.0:8080".parse().unwrap()]).unwrap_err();
    assert!(
        key == "dev" && text.contains("loopback only, not on 0.0.0.0:8080"),
        "{text}"
    );
}

#[test]
fn weak_missing_and_duplicate_secrets_are_configuration_errors() {
    let check = |config: Config, key: &str| assert_eq!(Auth::new(&config, &[]).unwrap_err().0, key);
    check(Config::default(), "jwt_secret");
    check(
        Config {
            jwt_secret: Some("short".into()),
            ..config()
        },
        "jwt_secret",
    );
    check(
        Config {
            api_key: Some("short".into()),
            ..config()
        },
        "api_key",
    );
    check(
        Config {
            jwt_secret_file: Some("/nowhere".into()),
            ..config()
        },
        "jwt_secret_file",
    );
    check(
        Config {
            jwt_secret: None,
            jwt_secret_file: Some("/nowhere/at/all".into()),
            ..config()
        },
        "jwt_secret_file",
    );
    assert!(!format!("{:?}", config()).contains("0123456789"));
}

#[test]
fn example_secrets_are_accepted_and_reported() {
    let placeholders = |config: Config| {
        Auth::new(&config, &[])
            .unwrap()
            .placeholders()
            .map(|(key, _)| key)
            .collect::<Vec<_>>()
    };
    let placeholder: Option<Secret> =
        Some("change-me: openssl rand -hex 32 makes a good one".into());
    assert_eq!(placeholders(config()), [""; 0]);
    assert_eq!(
        placeholders(Config {
            jwt_secret: placeholder.clone(),
            ..config()
        }),
        ["auth.jwt_secret"]
    );
    assert_eq!(
        placeholders(Config {
            jwt_secret: placeholder.clone(),
            api_key: placeholder,
            ..config()
        }),
        ["auth.jwt_secret", "auth.api_key"]
    );
}
