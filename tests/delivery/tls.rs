//! TLS on the listeners: HTTP/1.1 and HTTP/2, new certificates without a restart, and the errors of
//! clients and operators.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rcgen::{CertificateParams, DnType, Issuer, KeyPair};

use crate::harness::command::{output_of, pointsman, said};
use crate::harness::eventually;
use crate::harness::node::{Builder, Folder, Node, SOON};

/// An authority, and a certificate for loopback names that it issued, as files.
struct Issued {
    authority: PathBuf,
    chain: String,
    key: String,
}

fn issue(folder: &Path, name: &str) -> Issued {
    let new_key = || KeyPair::generate().expect("a key");
    let (of_authority, key) = (new_key(), new_key());
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    // Otherwise the certificate has the name of its issuer, and counts as self-signed.
    authority
        .distinguished_name
        .push(DnType::CommonName, format!("authority {name}"));
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&of_authority).expect("a certificate");
    let issuer = Issuer::new(authority, of_authority);
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let leaf = CertificateParams::new(names).expect("parameters");
    let leaf = leaf.signed_by(&key, &issuer).expect("a certificate");
    let path = folder.join(format!("{name}.pem"));
    fs::write(&path, certificate.pem()).expect("write");
    Issued {
        authority: path,
        chain: leaf.pem(),
        key: key.serialize_pem(),
    }
}

struct Site {
    folder: Folder,
    node: Node,
    issued: Issued,
}

fn start(more: &str) -> Site {
    start_with(more, Node::builder())
}

fn start_with(more: &str, builder: Builder) -> Site {
    let folder = Folder::new();
    let issued = issue(folder.path(), "first");
    install(&folder, &issued.chain, &issued.key);
    let [chain, key] = files(&folder);
    let config = format!(
        "[listen]\ntls_certificate = '{}'\ntls_key = '{}'\n{more}",
        chain.display(),
        key.display()
    );
    Site {
        node: builder.config(&config).start(),
        folder,
        issued,
    }
}

fn files(folder: &Folder) -> [PathBuf; 2] {
    ["tls.crt", "tls.key"].map(|name| folder.path().join(name))
}

fn install(folder: &Folder, chain: &str, key: &str) {
    let [chain_file, key_file] = files(folder);
    fs::write(chain_file, chain).expect("write");
    fs::write(key_file, key).expect("write");
}

/// Publishes an event to user 42 with the command, which trusts this authority.
fn publish(addr: SocketAddr, authority: &Path, id: &str) -> Command {
    let url = format!("https://{addr}");
    let mut command = pointsman(&["publish", "--url", &url, "--type", "t", "--user", "42"]);
    command.args(["--id", id, "--ca"]).arg(authority);
    command
}

/// A stream of user 42 by curl, which is ended when this is dropped.
struct Curl(Child, BufReader<std::process::ChildStdout>);

impl Curl {
    fn stream(addr: SocketAddr, authority: &Path, version: &str) -> Self {
        let mut command = Command::new("curl");
        command
            .args([
                "--silent",
                "--show-error",
                "--no-buffer",
                version,
                "--cacert",
            ])
            .arg(authority)
            .args(["--noproxy", "*"])
            .arg(format!("https://{addr}/v1/stream?user=42"))
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("run curl");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self(child, output)
    }

    /// Reads lines up to one with this text.
    fn await_text(&mut self, text: &str) {
        let mut read = String::new();
        while !read.contains(text) {
            let n = self.1.read_line(&mut read).expect("a line");
            assert!(n > 0, "the stream must not end before {text}: {read}");
        }
    }
}

impl Drop for Curl {
    fn drop(&mut self) {
        drop((self.0.kill(), self.0.wait()));
    }
}

#[test]
fn events_and_streams_pass_over_tls_in_http_1_and_http_2() {
    // The test asks the admin listener without TLS whether it is up, and any answer will do.
    let mut site = start_with("admin_tls = true\n", Node::builder().may_be_unready());
    let (addr, authority) = (site.node.addr(), &site.issued.authority.clone());
    let mut streams =
        ["--http1.1", "--http2"].map(|version| Curl::stream(addr, authority, version));
    for stream in &mut streams {
        stream.await_text("event: cursor");
    }
    output_of(&mut publish(addr, authority, "a"));
    for stream in &mut streams {
        stream.await_text("\"id\":\"a\"");
    }
    let version = Command::new("curl")
        .args(["--silent", "--noproxy", "*", "--cacert"])
        .arg(authority)
        .args(["--output", "/dev/null", "--write-out", "%{http_version}"])
        .arg(format!("https://{addr}/v1/ready"))
        .output()
        .expect("run curl");
    assert_eq!(String::from_utf8_lossy(&version.stdout), "2");
    let url = format!("https://{}", site.node.admin_addr());
    let list = output_of(pointsman(&["plugin", "list", "--url", &url, "--ca"]).arg(authority));
    assert!(list.contains("address"), "{list}");
    // The look at its lag, which follows otherwise, has no TLS.
    site.node.kill();
}

#[test]
fn a_client_that_does_not_know_the_authority_refuses_the_node() {
    let site = start("");
    let other = issue(site.folder.path(), "other");
    let (is_well, said) = said(&mut publish(site.node.addr(), &other.authority, "a"));
    assert!(!is_well && said.contains("certificate"), "{said}");
}

#[test]
fn a_new_certificate_takes_effect_without_a_restart_and_open_streams_stay() {
    let site = start("");
    let addr = site.node.addr();
    let mut stream = Curl::stream(addr, &site.issued.authority, "--http2");
    stream.await_text("event: cursor");

    // A key that belongs to another certificate changes nothing.
    let next = issue(site.folder.path(), "next");
    install(&site.folder, &next.chain, &site.issued.key);
    eventually(SOON, "readiness warns of the key", || {
        let page = site.node.admin("/readyz").body;
        (page.contains("listen.tls_key") && page.contains("stays in use")).then_some(())
    });
    output_of(&mut publish(addr, &site.issued.authority, "a"));
    stream.await_text("\"id\":\"a\"");

    install(&site.folder, &next.chain, &next.key);
    eventually(SOON, "the new certificate is in use", || {
        said(&mut publish(addr, &next.authority, "b"))
            .0
            .then_some(())
    });
    stream.await_text("\"id\":\"b\"");
    assert!(!site.node.admin("/readyz").body.contains("tls"));
    let (is_well, _) = said(&mut publish(addr, &site.issued.authority, "c"));
    assert!(!is_well, "the old certificate must not be in use");
}

#[test]
fn http_without_tls_is_refused_with_the_fix() {
    let site = start("");
    let mut socket = TcpStream::connect(site.node.addr()).expect("connect");
    socket
        .write_all(b"GET /v1/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .expect("write");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("use https:// here\"}"),
        "{answer}"
    );
}

/// Neither silence nor bytes that are not TLS hold a connection for longer than a request head.
#[test]
fn a_handshake_that_does_not_end_is_cut() {
    let site = start("header_timeout = '1s'\n");
    for sent in [&b""[..], b"\x16\x03\x01\x02", b"\x00\xff\x00"] {
        let mut socket = TcpStream::connect(site.node.addr()).expect("connect");
        socket.set_read_timeout(Some(SOON)).expect("a deadline");
        socket.write_all(sent).expect("write");
        let mut answer = Vec::new();
        // A reset is an end as well.
        if let Err(error) = socket.read_to_end(&mut answer) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "{sent:?}"
            );
        }
    }
    output_of(&mut publish(site.node.addr(), &site.issued.authority, "a"));
}

#[test]
fn a_certificate_that_cannot_be_used_is_refused_at_the_start() {
    let folder = Folder::new();
    let (one, other) = (issue(folder.path(), "one"), issue(folder.path(), "other"));
    let [chain, key] = files(&folder).map(|path| path.display().to_string());
    let both = format!("tls_certificate = '{chain}'\ntls_key = '{key}'\n");
    let cases = [
        (
            &one.chain,
            &other.key,
            both.as_str(),
            "give the key of this certificate",
        ),
        (&one.key, &one.key, &both, "holds no certificate in PEM"),
        (&one.chain, &one.chain, &both, "holds no private key in PEM"),
        (
            &one.chain,
            &one.key,
            "tls_certificate = 'tls.crt'\n",
            "set both or none",
        ),
        (
            &one.chain,
            &one.key,
            "tls_key = 'tls.key'\n",
            "set both or none",
        ),
        (
            &one.chain,
            &one.key,
            "admin_tls = true\n",
            "set listen.tls_certificate",
        ),
    ];
    let config = folder.path().join("pointsman.toml");
    for (chain, key, lines, fix) in cases {
        install(&folder, chain, key);
        fs::write(&config, format!("[listen]\n{lines}")).expect("write");
        let mut command = pointsman(&["check-config", "--ephemeral", "--dev", "--config"]);
        let (is_well, said) = said(command.arg(&config));
        assert!(!is_well && said.contains(fix), "{fix}: {said}");
    }
}
