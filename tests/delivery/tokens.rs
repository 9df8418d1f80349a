//! Keys of tokens: every algorithm as other software signs with it, keys from files and key
//! servers, their rotation, and the classic attacks on tokens.
//!
//! Requires openssl and Python with venv; Authlib is installed from PyPI once.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};

use super::authorization::{in_s, signed, signed_with};
use crate::harness::command::output_of;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::sse::{Frame, OpenError, Request, Stream};
use crate::harness::{eventually, http, ports, repository};

const KEY: &str = "the key of these tests";
const LEAN: &str = "[plugins.discard]\nenabled = false";
/// Long enough for every HMAC.
const SECRET: &str = "a secret of 64 bytes for the tests of tokens, and of no other use";
const ALGORITHMS: [&str; 12] = [
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256",
    "ES384", "EdDSA",
];

/// Runs a command and returns its output.
fn run(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}; `make test` installs it"));
    let mut stdin = child.stdin.take().expect("a pipe");
    // A command that needs no input may have closed it.
    stdin.write_all(input).ok();
    drop(stdin);
    let output = child.wait_with_output().expect("an output");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output.stdout
}

fn openssl(folder: &Path, arguments: &str, input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("openssl");
    command
        .args(arguments.split_whitespace())
        .current_dir(folder);
    run(&mut command, input)
}

/// Makes a key of each type: `NAME.pem`, and the public key as `NAME.pub`.
fn make_keys(folder: &Path) {
    for (name, options) in [
        ("rsa", "-algorithm RSA -pkeyopt rsa_keygen_bits:2048"),
        ("p256", "-algorithm EC -pkeyopt ec_paramgen_curve:P-256"),
        ("p384", "-algorithm EC -pkeyopt ec_paramgen_curve:P-384"),
        ("ed25519", "-algorithm ed25519"),
    ] {
        openssl(folder, &format!("genpkey {options} -out {name}.pem"), b"");
        openssl(
            folder,
            &format!("pkey -in {name}.pem -pubout -out {name}.pub"),
            b"",
        );
    }
    fs::write(folder.join("secret"), SECRET).expect("write the secret");
}

fn key_of(algorithm: &str) -> &'static str {
    match algorithm {
        "ES256" => "p256",
        "ES384" => "p384",
        "EdDSA" => "ed25519",
        algorithm if algorithm.starts_with("HS") => "secret",
        _ => "rsa",
    }
}

/// The two numbers of an ECDSA signature in DER, each in `n` bytes, as JWS has them.
fn fixed(der: &[u8], n: usize) -> Vec<u8> {
    let number = |at: usize| {
        let length = usize::from(der[at + 1]);
        (&der[at + 2..at + 2 + length], at + 2 + length)
    };
    // Both lengths take one byte for these curves.
    let (r, next) = number(2);
    let (s, _) = number(next);
    [r, s]
        .into_iter()
        .flat_map(|number| {
            let number = &number[number.len().saturating_sub(n)..];
            [vec![0; n - number.len()], number.to_vec()].concat()
        })
        .collect()
}

fn encoded(header: &Value, claims: &Value) -> String {
    let [header, claims] =
        [header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
    format!("{header}.{claims}")
}

/// A token signed by the `openssl` command.
fn by_openssl(folder: &Path, algorithm: &str, header: &Value, claims: &Value) -> String {
    let message = encoded(header, claims);
    fs::write(folder.join("message"), &message).expect("write the message");
    let key = key_of(algorithm);
    let bits = &algorithm[2..];
    let signature = match &algorithm[..2] {
        "HS" => openssl(
            folder,
            &format!(
                "dgst -sha{bits} -mac HMAC -macopt hexkey:{} -binary message",
                hex(SECRET)
            ),
            b"",
        ),
        "RS" => openssl(
            folder,
            &format!("dgst -sha{bits} -sign {key}.pem -binary message"),
            b"",
        ),
        "PS" => openssl(
            folder,
            &format!(
                "dgst -sha{bits} -sign {key}.pem -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest -binary message"
            ),
            b"",
        ),
        "ES" => fixed(
            &openssl(
                folder,
                &format!("dgst -sha{bits} -sign {key}.pem -binary message"),
                b"",
            ),
            if bits == "256" { 32 } else { 48 },
        ),
        _ => openssl(
            folder,
            &format!("pkeyutl -sign -inkey {key}.pem -rawin -in message"),
            b"",
        ),
    };
    format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// The Python interpreter of an environment that has Authlib.
fn python() -> PathBuf {
    const REQUIREMENTS: [&str; 2] = ["authlib==1.9.10", "cryptography==50.0.2"];
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("authlib-1.9.10");
    let interpreter = folder.join("bin/python");
    let is_there = folder.join("complete");
    if !is_there.exists() {
        run(
            Command::new("python3").args(["-m", "venv"]).arg(&folder),
            b"",
        );
        let mut pip = Command::new(&interpreter);
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]);
        run(pip.args(REQUIREMENTS), b"");
        fs::write(is_there, "").expect("mark it complete");
    }
    interpreter
}

fn open(node: &Node, token: &str, query: &str) -> Result<Stream, OpenError> {
    Request::new(node.addr(), query)
        .header("Authorization", &format!("Bearer {token}"))
        .open(SOON)
}

/// A stream opens, and a notification for its user arrives.
fn assert_accepted(node: &Node, token: &str, user: &str) {
    let mut stream = open(node, token, "").unwrap_or_else(|e| panic!("{user}: {e:?}"));
    stream.next_state("cursor", SOON);
    publish(node, user);
    let notification = stream.next_notification(SOON);
    assert_eq!(notification.to, format!("u:{user}"));
}

fn publish(node: &Node, user: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let id = COUNT.fetch_add(1, Ordering::Relaxed).to_string();
    let bearer = format!("Bearer {KEY}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/cloudevents+json"),
    ];
    let body = event(&id, "t", json!({ "user": user })).to_string();
    let answer = node.send("POST", "/v1/events", &headers, body.as_bytes());
    assert_eq!(answer.status, 202, "{answer:?}");
}

/// Asserts that every route of readers refuses a token with 401.
fn assert_refused(node: &Node, token: &str, what: &str) {
    let refused = open(node, token, "").expect_err(what);
    assert_eq!(refused.status, Some(401), "{what}: {refused:?}");
    let bearer = format!("Bearer {token}");
    let url = node.url("/v1/notifications");
    let answer = http::send("GET", &url, &[("authorization", &bearer)], None).expect("an answer");
    assert_eq!(answer.status, 401, "{what}: {answer:?}");
}

/// A node in production with this `[auth]` section besides the API key.
fn node(auth: &str) -> Node {
    let config = format!("[auth]\napi_key = \"{KEY}\"\nleeway = \"0s\"\n{auth}\n{LEAN}");
    Node::builder().production().config(&config).start()
}

#[test]
fn tokens_that_openssl_and_authlib_sign_with_each_algorithm_open_a_stream() {
    let folder = Folder::new();
    let folder = folder.path();
    make_keys(folder);
    let at = |name: &str| folder.join(name).display().to_string();
    let public = ["rsa", "p256", "p384", "ed25519"]
        .map(|name| format!("\"{}\"", at(&format!("{name}.pub"))));
    // The secret and a file of PEM for each key.
    let of_files = node(&format!(
        "jwt_secret_file = \"{}\"\njwt_key_files = [{}]",
        at("secret"),
        public.join(", ")
    ));
    let expires = in_s(3_600);
    let mut by_all = BTreeMap::new();
    for algorithm in ALGORITHMS {
        let user = format!("openssl-{algorithm}");
        let header = json!({ "alg": algorithm, "typ": "JWT" });
        let claims = json!({ "sub": user, "exp": expires });
        let token = by_openssl(folder, algorithm, &header, &claims);
        assert_accepted(&of_files, &token, &user);
        by_all.insert(algorithm, token);
    }
    let mut command = Command::new(python());
    command
        .arg(repository().join("tests/delivery/tokens.py"))
        .args([folder.display().to_string(), expires.to_string()])
        .args(ALGORITHMS);
    let tokens: BTreeMap<String, String> =
        serde_json::from_slice(&run(&mut command, b"")).expect("JSON");
    // One JWK set, as Authlib writes it, with the secret.
    let of_set = node(&format!("jwt_key_files = [\"{}\"]", at("jwks.json")));
    for algorithm in ALGORITHMS {
        let user = format!("authlib-{algorithm}");
        assert_accepted(&of_files, &tokens[algorithm], &user);
        assert_accepted(&of_set, &tokens[algorithm], &user);
        // Without a `kid`, every key of the type is tried.
        assert!(open(&of_set, &by_all[algorithm], "").is_ok(), "{algorithm}");
    }
    // The signature of each token belongs to its own header and claims only.
    for (algorithm, token) in &by_all {
        let (message, signature) = token.rsplit_once('.').expect("a signature");
        let (header, _) = message.split_once('.').expect("claims");
        let claims = json!({ "sub": "eve", "exp": expires }).to_string();
        let forged = format!(
            "{header}.{}.{signature}",
            BASE64_URL_SAFE_NO_PAD.encode(claims)
        );
        assert_refused(&of_files, &forged, algorithm);
        let other = if *algorithm == "RS256" {
            "PS256"
        } else {
            "RS256"
        };
        let header = BASE64_URL_SAFE_NO_PAD.encode(json!({ "alg": other }).to_string());
        let (_, claims) = message.split_once('.').expect("claims");
        assert_refused(
            &of_files,
            &format!("{header}.{claims}.{signature}"),
            algorithm,
        );
    }
}

#[test]
fn the_classic_attacks_on_tokens_are_refused() {
    let folder = Folder::new();
    let folder = folder.path();
    make_keys(folder);
    let server = KeyServer::start();
    let evil = SigningKey::new("evil");
    server.answer(&Answer::Keys(vec![evil.public()]));
    let public = folder.join("rsa.pub");
    let node = node(&format!("jwt_key_files = [\"{}\"]", public.display()));
    let claims = json!({ "sub": "ann", "exp": in_s(3_600) });
    let honest = by_openssl(folder, "RS256", &json!({ "alg": "RS256" }), &claims);
    assert!(open(&node, &honest, "").is_ok());

    let pem = fs::read_to_string(&public).expect("the key");
    for secret in [pem.as_str(), pem.trim_end()] {
        let token = signed("HS256", hmac::HMAC_SHA256, secret, &claims);
        assert_refused(&node, &token, "the public key as the secret of an HMAC");
    }
    for name in ["none", "None", "NONE", "nOnE", ""] {
        for signature in ["", "AAAA"] {
            let token = format!("{}.{signature}", encoded(&json!({ "alg": name }), &claims));
            assert_refused(&node, &token, "no algorithm");
        }
    }
    let empty = signed("HS256", hmac::HMAC_SHA256, "", &claims);
    for kid in [
        "../../../../dev/null",
        "/dev/null",
        "' UNION SELECT 'x",
        "",
        "rsa\u{0}",
    ] {
        let header = json!({ "alg": "HS256", "kid": kid });
        assert_refused(
            &node,
            &signed_with(&header, hmac::HMAC_SHA256, "", &claims),
            kid,
        );
        assert_refused(
            &node,
            &evil.sign(&json!({ "alg": "ES256", "kid": kid }), &claims),
            kid,
        );
    }
    assert_refused(&node, &empty, "the empty secret");
    // Keys and their places come from the configuration alone.
    let url = server.url();
    for header in [
        json!({ "alg": "ES256", "kid": "evil", "jku": url }),
        json!({ "alg": "ES256", "kid": "evil", "x5u": url }),
        json!({ "alg": "ES256", "kid": "evil", "jwk": evil.public() }),
    ] {
        assert_refused(&node, &evil.sign(&header, &claims), &header.to_string());
    }
    assert_eq!(server.count(), 0, "no token makes a node fetch anything");

    // Two values for one thing: the first member, the last member, the second header.
    let (message, signature) = honest.rsplit_once('.').expect("a signature");
    let (_, body) = message.split_once('.').expect("claims");
    for header in [
        r#"{"alg":"none","alg":"RS256"}"#,
        r#"{"alg":"RS256","alg":"none"}"#,
    ] {
        let header = BASE64_URL_SAFE_NO_PAD.encode(header);
        assert_refused(&node, &format!("{header}.{body}.{signature}"), "alg twice");
    }
    let twice = Request::new(node.addr(), "")
        .header("Authorization", &format!("Bearer {honest}"))
        .header("Authorization", "Bearer x");
    assert_eq!(twice.open(SOON).expect_err("two headers").status, Some(401));

    let huge = format!("{}.{}.{signature}", "e30", "A".repeat(12 * 1024));
    assert_refused(&node, &huge, "a huge token");
    let refused = open(&node, &"A".repeat(1024 * 1024), "").expect_err("a huge head");
    assert!(
        refused
            .status
            .is_none_or(|status| (400..500).contains(&status)),
        "{refused:?}"
    );
    let distant = json!({ "sub": "ann", "exp": in_s(11 * 365 * 24 * 3_600) });
    let distant = by_openssl(folder, "RS256", &json!({ "alg": "RS256" }), &distant);
    assert_refused(&node, &distant, "a token for more than ten years");
    assert!(open(&node, &honest, "").is_ok());
}

/// A pipe that no program writes to, and a file larger than the memory.
#[test]
fn files_that_cannot_be_read_to_an_end_stop_nothing() {
    let folder = Folder::new();
    let key_file = folder.path().join("api-key");
    fs::write(&key_file, "the first key of publishers").expect("write");
    let config = format!(
        "[auth]\njwt_secret = \"{SECRET}\"\napi_key_file = \"{}\"\n{LEAN}",
        key_file.display()
    );
    let node = Node::builder().production().config(&config).start();
    let publishes = |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/cloudevents+json"),
        ];
        let body = event("a", "t", json!({ "user": "ann" })).to_string();
        node.send("POST", "/v1/events", &headers, body.as_bytes())
            .status
    };
    let pipe_at = |path: &Path| {
        fs::remove_file(path).expect("remove it");
        output_of(Command::new("mkfifo").arg(path));
    };
    let config_file = node.folder().join("pointsman.toml");
    pipe_at(&key_file);
    eventually(SOON, "readiness names the pipe", || {
        let warnings = warnings(&node);
        (warnings.contains("auth.api_key_file") && warnings.contains("not a regular file"))
            .then_some(())
    });
    pipe_at(&config_file);
    eventually(SOON, "readiness names the configuration", || {
        warnings(&node).contains("pointsman.toml").then_some(())
    });
    assert_eq!(publishes("the first key of publishers"), 202);

    fs::remove_file(&key_file).expect("remove the pipe");
    let endless = fs::File::create(&key_file).expect("create");
    endless.set_len(1 << 40).expect("a sparse file");
    eventually(SOON, "readiness names the size", || {
        warnings(&node)
            .contains("more than 1048576 bytes")
            .then_some(())
    });
    fs::write(&key_file, "the second key of publishers").expect("write");
    eventually(SOON, "the new API key is in effect", || {
        (publishes("the second key of publishers") == 202).then_some(())
    });
    fs::remove_file(&config_file).expect("remove the pipe");
    fs::write(&config_file, &config).expect("write");
    eventually(SOON, "nothing is left to warn of", || {
        (!warnings(&node).contains("pointsman.toml")).then_some(())
    });
}

#[test]
fn a_rotated_secret_or_key_file_takes_effect_without_a_restart() {
    let folder = Folder::new();
    let folder = folder.path();
    make_keys(folder);
    let at = |name: &str| folder.join(name);
    let replace = |name: &str, text: &str| {
        fs::write(at("draft"), text).expect("write a draft");
        fs::rename(at("draft"), at(name)).expect("rename it");
    };
    let read = |name: &str| fs::read_to_string(at(name)).expect("a file");
    replace("current.pub", &read("p256.pub"));
    replace("api-key", "the first key of publishers");
    let config = format!(
        "[auth]\njwt_secret_file = \"{}\"\njwt_key_files = [\"{}\"]\napi_key_file = \"{}\"\n{LEAN}",
        at("secret").display(),
        at("current.pub").display(),
        at("api-key").display()
    );
    let node = Node::builder().production().config(&config).start();
    let claims = json!({ "sub": "ann", "exp": in_s(3_600) });
    let of = |algorithm: &str| by_openssl(folder, algorithm, &json!({ "alg": algorithm }), &claims);
    let (first_secret, of_p256, of_ed25519) = (of("HS256"), of("ES256"), of("EdDSA"));
    let second = "another secret, which is longer than 32 bytes";
    let second_secret = signed("HS256", hmac::HMAC_SHA256, second, &claims);
    let publishes = |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/cloudevents+json"),
        ];
        let body = event(key, "t", json!({ "user": "ann" })).to_string();
        node.send("POST", "/v1/events", &headers, body.as_bytes())
            .status
    };
    let mut opened = open(&node, &first_secret, "").expect("200");
    opened.next_state("cursor", SOON);
    assert!(open(&node, &of_p256, "").is_ok());
    assert_refused(&node, &second_secret, "before the change");
    assert_refused(&node, &of_ed25519, "before the change");

    replace("secret", second);
    eventually(SOON, "the new secret is in effect", || {
        open(&node, &second_secret, "").ok()
    });
    assert_refused(&node, &first_secret, "the former secret");
    replace("current.pub", &read("ed25519.pub"));
    eventually(SOON, "the new key is in effect", || {
        open(&node, &of_ed25519, "").ok()
    });
    assert_refused(&node, &of_p256, "the former key");
    assert_eq!(publishes("the first key of publishers"), 202);
    replace("api-key", "the second key of publishers");
    eventually(SOON, "the new API key is in effect", || {
        (publishes("the second key of publishers") == 202).then_some(())
    });
    assert_eq!(publishes("the first key of publishers"), 401);

    // Unusable content leaves the former one in effect, and readiness names it.
    for (name, text, key) in [
        ("secret", "short", "auth.jwt_secret_file"),
        ("current.pub", &read("rsa.pem"), "auth.jwt_key_files"),
        ("api-key", "", "auth.api_key_file"),
    ] {
        replace(name, text);
        eventually(SOON, "readiness names the file", || {
            warnings(&node).contains(key).then_some(())
        });
    }
    assert!(open(&node, &second_secret, "").is_ok());
    assert!(open(&node, &of_ed25519, "").is_ok());
    assert_eq!(publishes("the second key of publishers"), 202);
    fs::remove_file(at("secret")).expect("remove the secret");
    replace("current.pub", &read("p256.pub"));
    eventually(SOON, "the key is in effect again", || {
        open(&node, &of_p256, "").ok()
    });
    assert!(!warnings(&node).contains("auth.jwt_key_files"));
    assert!(open(&node, &second_secret, "").is_ok());
    // A stream stays open until its token expires: only new requests are checked.
    let (ids, log): (Vec<String>, _) = (
        [(); 2].map(|()| opened.next_notification(SOON).id).to_vec(),
        node.log(),
    );
    assert_eq!(
        ids,
        [
            "the first key of publishers",
            "the second key of publishers"
        ]
    );
    assert!(
        !log.contains(second) && !log.contains("key of publishers"),
        "{log}"
    );
}

/// The warnings of `/readyz`, as text.
fn warnings(node: &Node) -> String {
    let url = node.admin_url("/readyz");
    let answer =
        http::send("GET", &url, &[("accept", "application/json")], None).expect("an answer");
    answer.json()["warnings"].to_string()
}

/// A key of a key server, which signs with ES256.
struct SigningKey {
    id: String,
    pair: EcdsaKeyPair,
}

impl SigningKey {
    fn new(id: &str) -> Self {
        let random = SystemRandom::new();
        let pair =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pair.as_ref(), &random);
        Self {
            id: id.to_owned(),
            pair: pair.expect("a key"),
        }
    }

    fn public(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let [x, y] = [&point[1..33], &point[33..]].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part));
        json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id, "x": x, "y": y })
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = encoded(header, claims);
        let signature = self
            .pair
            .sign(&SystemRandom::new(), message.as_bytes())
            .expect("a signature");
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    fn token(&self, user: &str) -> String {
        let header = json!({ "alg": "ES256", "kid": self.id });
        self.sign(&header, &json!({ "sub": user, "exp": in_s(3_600) }))
    }
}

/// The behaviour of a key server.
#[derive(Clone, Debug)]
enum Answer {
    Keys(Vec<Value>),
    Text(u16, String),
    Redirect(String),
    Hang,
}

/// A key server whose behaviour a test changes.
struct KeyServer {
    addr: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    /// Requests so far, at the moment, and the most at once.
    counts: Arc<[AtomicUsize; 3]>,
}

impl KeyServer {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("an address");
        let answer = Arc::new(Mutex::new(Answer::Keys(Vec::new())));
        let counts: Arc<[AtomicUsize; 3]> = Arc::default();
        let (shared, counted) = (Arc::clone(&answer), Arc::clone(&counts));
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let (answer, counts) = (Arc::clone(&shared), Arc::clone(&counted));
                std::thread::spawn(move || {
                    counts[0].fetch_add(1, Ordering::SeqCst);
                    let now = counts[1].fetch_add(1, Ordering::SeqCst) + 1;
                    counts[2].fetch_max(now, Ordering::SeqCst);
                    let answer = answer.lock().expect("no panic").clone();
                    // The client may be gone.
                    serve(&socket, &answer).ok();
                    counts[1].fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            addr,
            answer,
            counts,
        }
    }

    fn url(&self) -> String {
        format!("http://{}/keys", self.addr)
    }

    fn answer(&self, answer: &Answer) {
        self.answer.lock().expect("no panic").clone_from(answer);
    }

    fn count(&self) -> usize {
        self.counts[0].load(Ordering::SeqCst)
    }
}

fn serve(mut socket: &TcpStream, answer: &Answer) -> std::io::Result<()> {
    for line in BufReader::new(socket).lines() {
        if line?.is_empty() {
            break;
        }
    }
    match answer {
        Answer::Keys(keys) => respond(socket, 200, "", &json!({ "keys": keys }).to_string()),
        Answer::Text(status, text) => respond(socket, *status, "", text),
        Answer::Redirect(to) => respond(socket, 302, &format!("Location: {to}\r\n"), ""),
        // Until the client gives up.
        Answer::Hang => socket.read(&mut [0]).map(|_| ()),
    }
}

fn respond(mut socket: &TcpStream, status: u16, headers: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(
        socket,
        "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}"
    )
}

/// The reason of the `close` with which a node answers a stream.
fn close_reason(node: &Node, token: &str) -> Option<String> {
    let frame: Frame = open(node, token, "").ok()?.next_frame(SOON).ok()?;
    let data: Value = serde_json::from_str(frame.data.as_deref()?).ok()?;
    Some(data["reason"].as_str()?.to_owned())
}

#[test]
fn a_key_server_may_rotate_fail_and_hang() {
    let server = KeyServer::start();
    let keys = ["k1", "k2", "k3", "k4"].map(SigningKey::new);
    let [k1, k2, k3, k4] = &keys;
    server.answer(&Answer::Keys(vec![k1.public()]));
    // No fetch but the first one happens by itself.
    let node = node(&format!(
        "jwks_urls = [\"{}\"]\njwks_refresh_interval = \"1d\"\njwks_retry_interval = \"1s\"",
        server.url()
    ));
    eventually(SOON, "the keys are fetched", || {
        open(&node, &k1.token("ann"), "").ok()
    });
    assert_accepted(&node, &k1.token("ann"), "ann");
    let mut opened = open(&node, &k1.token("ann"), "").expect("200");
    opened.next_state("cursor", SOON);

    // A token of an unknown key brings the new keys, and the former ones are withdrawn.
    let encryption = json!({ "kty": "RSA", "use": "enc", "kid": "k9", "n": "AQAB", "e": "AQAB" });
    let unknown = json!({ "kty": "XYZ", "kid": "k8" });
    server.answer(&Answer::Keys(vec![encryption, unknown, k2.public()]));
    eventually(SOON, "the new key is in effect", || {
        open(&node, &k2.token("ann"), "").ok()
    });
    assert_refused(&node, &k1.token("ann"), "a withdrawn key");
    publish(&node, "ann");
    assert_eq!(opened.next_notification(SOON).to, "u:ann");

    // Unknown keys do not cause a fetch each.
    let (before, begin) = (server.count(), Instant::now());
    for n in 0..50 {
        assert_refused(
            &node,
            &SigningKey::new(&format!("x{n}")).token("eve"),
            "an unknown key",
        );
    }
    let allowed = usize::try_from(begin.elapsed().as_secs()).expect("a short time") + 2;
    assert!(
        server.count() - before <= allowed,
        "{} fetches",
        server.count() - before
    );

    // While fetches fail, the known keys stay in effect; a token of another key has to wait.
    let elsewhere = KeyServer::start();
    elsewhere.answer(&Answer::Keys(vec![k3.public()]));
    let shared = json!({ "kty": "oct", "kid": "k3", "k": BASE64_URL_SAFE_NO_PAD.encode(SECRET) });
    let huge = json!({ "keys": [k3.public()], "x": "x".repeat(300 * 1024) }).to_string();
    for fault in [
        Answer::Text(500, String::new()),
        Answer::Text(200, "<html>".to_owned()),
        Answer::Text(200, huge),
        Answer::Keys(vec![]),
        Answer::Keys(vec![shared]),
        Answer::Keys((0..65).map(|_| k3.public()).collect()),
        Answer::Redirect(elsewhere.url()),
    ] {
        server.answer(&fault);
        eventually(SOON, "a fetch has failed", || {
            (close_reason(&node, &k3.token("ann"))? == "unavailable").then_some(())
        });
        assert!(open(&node, &k2.token("ann"), "").is_ok(), "{fault:?}");
        // A forged token is not one of an unknown key.
        let header = json!({ "alg": "ES256", "kid": "k2" });
        let claims = json!({ "sub": "ann", "exp": in_s(3_600) });
        assert_refused(&node, &k3.sign(&header, &claims), "a forged token");
    }
    assert_eq!(elsewhere.count(), 0, "redirects are not followed");
    let bearer = format!("Bearer {}", k3.token("ann"));
    let url = node.url("/v1/notifications");
    let answer = http::send("GET", &url, &[("authorization", &bearer)], None).expect("an answer");
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.header("retry-after").is_some(), "{answer:?}");

    // A server that hangs delays only tokens of unknown keys, which wait for the same fetch.
    server.answer(&Answer::Hang);
    server.counts[2].store(0, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                assert_eq!(
                    close_reason(&node, &k4.token("ann")).as_deref(),
                    Some("unavailable")
                );
            });
        }
        for _ in 0..5 {
            assert!(open(&node, &k2.token("ann"), "").is_ok());
        }
    });
    assert!(
        server.counts[2].load(Ordering::SeqCst) <= 1,
        "one fetch at a time"
    );
    server.answer(&Answer::Keys(vec![k2.public(), k4.public()]));
    eventually(SOON, "the server is back", || {
        let mut stream = open(&node, &k4.token("ann"), "").ok()?;
        (stream.next_frame(SOON).ok()?.state() == Some("cursor")).then_some(())
    });
    let log = node.log();
    assert!(!log.contains(&k4.token("ann")[..40]), "{log}");
}

#[test]
fn readiness_names_a_key_server_that_cannot_be_fetched() {
    let server = KeyServer::start();
    server.answer(&Answer::Text(500, String::new()));
    let key = SigningKey::new("k1");
    let node = node(&format!(
        "jwks_urls = [\"{}\"]\njwks_refresh_interval = \"1s\"\njwks_retry_interval = \"1s\"",
        server.url()
    ));
    eventually(SOON, "readiness names the server", || {
        warnings(&node).contains("the status is 500").then_some(())
    });
    assert_eq!(
        close_reason(&node, &key.token("ann")).as_deref(),
        Some("unavailable")
    );
    server.answer(&Answer::Keys(vec![key.public()]));
    eventually(SOON, "the warning ends", || {
        (!warnings(&node).contains("jwks_urls")).then_some(())
    });
    assert_accepted(&node, &key.token("ann"), "ann");
    // Rotation without a request: the set is fetched at intervals.
    server.answer(&Answer::Keys(vec![SigningKey::new("k2").public()]));
    eventually(SOON, "the key is withdrawn", || {
        (open(&node, &key.token("ann"), "").err()?.status == Some(401)).then_some(())
    });
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn keys_are_fetched_over_tls_from_a_server_of_a_trusted_authority_only() {
    let folder = Folder::new();
    let folder = folder.path();
    let authority = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -addext basicConstraints=critical,CA:true -keyout ca.key -out ca.pem";
    openssl(folder, authority, b"");
    openssl(
        folder,
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=keys -keyout server.key -out server.csr",
        b"",
    );
    fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1\n").expect("write the names");
    openssl(
        folder,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -days 2 -extfile names -out server.pem",
        b"",
    );
    let key = SigningKey::new("k1");
    let set = json!({ "keys": [key.public()] }).to_string();
    fs::write(folder.join("keys.json"), set).expect("write the keys");
    let port = ports::free().port();
    let server = Command::new("openssl")
        .args([
            "s_server",
            "-WWW",
            "-cert",
            "server.pem",
            "-key",
            "server.key",
            "-accept",
        ])
        .arg(format!("127.0.0.1:{port}"))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl; `make test` installs it");
    let _server = Running(server);
    eventually(SOON, "the server listens", || {
        TcpStream::connect(("127.0.0.1", port)).ok()
    });
    let urls = format!(
        "jwks_urls = [\"https://127.0.0.1:{port}/keys.json\"]\njwks_retry_interval = \"1s\""
    );
    let ca_file = folder.join("ca.pem");
    let trusting = node(&format!("{urls}\njwks_ca_file = \"{}\"", ca_file.display()));
    eventually(SOON, "the keys are fetched", || {
        let mut stream = open(&trusting, &key.token("ann"), "").ok()?;
        (stream.next_frame(SOON).ok()?.state() == Some("cursor")).then_some(())
    });
    let other = node(&urls);
    eventually(SOON, "readiness names the fault", || {
        warnings(&other).contains("cannot be fetched").then_some(())
    });
    assert_eq!(
        close_reason(&other, &key.token("ann")).as_deref(),
        Some("unavailable")
    );
}

#[test]
fn a_key_that_cannot_be_used_is_a_configuration_error_with_the_fix() {
    let folder = Folder::new();
    let folder = folder.path();
    make_keys(folder);
    openssl(
        folder,
        "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:1024 -out weak.pem",
        b"",
    );
    openssl(folder, "pkey -in weak.pem -pubout -out weak.pub", b"");
    openssl(
        folder,
        "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:secp256k1 -out k1.pem",
        b"",
    );
    openssl(folder, "pkey -in k1.pem -pubout -out k1.pub", b"");
    let private = json!({ "kty": "OKP", "crv": "Ed25519", "x": "AA", "d": "AA" });
    let short = json!({ "keys": [{ "kty": "oct", "k": "c2hvcnQ" }] });
    for (name, text, expect) in [
        ("rsa.pem", None, "openssl pkey -pubout"),
        ("weak.pub", None, "2048 to 8192 bits"),
        ("k1.pub", None, "P-256, P-384"),
        ("empty", Some(String::new()), "holds no key"),
        (
            "private.json",
            Some(private.to_string()),
            "is a private key",
        ),
        ("short.json", Some(short.to_string()), "less than 32 bytes"),
        (
            "none.json",
            Some("{\"keys\":[]}".to_owned()),
            "holds no key for signatures",
        ),
        ("broken.json", Some("{".to_owned()), "is not a JWK set"),
        ("absent", None, "cannot be read"),
    ] {
        if let Some(text) = text {
            fs::write(folder.join(name), text).expect("write a key");
        }
        let file = folder.join("pointsman.toml");
        let key = folder.join(name);
        let text = format!(
            "[broker]\nephemeral = true\n[auth]\njwt_key_files = [\"{}\"]\n",
            key.display()
        );
        fs::write(&file, text).expect("write pointsman.toml");
        let output = Command::new(env!("CARGO_BIN_EXE_pointsman"))
            .args(["check-config", "--config"])
            .arg(&file)
            .output()
            .expect("run pointsman");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.lines().count() == 1,
            "{name}: {said}"
        );
        assert!(
            said.contains("auth.jwt_key_files") && said.contains(expect),
            "{name}: {said}"
        );
        assert!(!said.contains("BEGIN"), "{said}");
    }
}
