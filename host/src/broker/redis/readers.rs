//! Connections that wait for the next entry of a source.
//!
//! `XREAD BLOCK` is the only command that wakes up when any client adds an entry, and it answers
//! with the entry, however large. These connections therefore read its answer themselves: they stop
//! where an entry exceeds the limit, keep its beginning and close the connection. The rest of the
//! entry is not transferred, except for what the sockets had buffered.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use redis::ConnectionInfo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::command_connection::{DEADLINE, explain};
use super::pubsub_connection::{Socket, dial};
use super::resp::encode;
use super::{Redis, parse_text};
use crate::broker::partition::excerpt;
use crate::broker::{EXCERPT_BYTES, Entry, Error, MAX_ENTRY_FIELDS, Oversized, Result};
use crate::event::EntryId;

/// Idle connections kept per partition. A partition has one owner, and occasionally a second one.
const IDLE: usize = 2;
/// The deadline of a read doubles this often at most, to 64 s, while reads time out.
const MOST_DOUBLINGS: u32 = 5;
/// How often a late read looks for a newer connection of the node.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The connections of one partition that wait for entries. Each wait uses its own connection,
/// because a blocking command delays everything behind it.
///
/// A connection older than the current shared connection is not reused: after a failover it may
/// lead to the former primary, and its entries would be committed as entries of the new one.
#[derive(Default)]
pub(super) struct Readers {
    /// Each with the generation of the shared connection at the time it was opened.
    idle: Mutex<Vec<(u64, EntryConnection)>>,
    /// Reads in a row that Redis did not answer in time. It may copy a large entry for longer than
    /// any fixed deadline, and would then do so again at each repetition.
    timeouts: AtomicU32,
}

impl Readers {
    /// Whether the last read was not answered in time.
    pub(super) fn is_slow(&self) -> bool {
        self.timeouts.load(Ordering::Relaxed) > 0
    }

    pub(super) fn note_timeout(&self) {
        let more = |n: u32| Some(n.saturating_add(1).min(MOST_DOUBLINGS));
        // The closure returns a value for every input.
        let _before = self
            .timeouts
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Returns the first entry after `after`, waiting up to `wait` for it; only the beginning of
    /// one with more than `max_event_bytes`. Dropping the future closes the connection, which also
    /// ends the wait in Redis.
    pub(super) async fn next(
        &self,
        redis: &Redis,
        source: &str,
        after: EntryId,
        wait: Duration,
        max_event_bytes: usize,
    ) -> Result<Option<Entry>> {
        let generation = redis.connection.generation();
        let idle = {
            let mut idle = self.idle();
            idle.retain(|(of, _)| *of == generation);
            idle.pop()
        };
        let doublings = self.timeouts.load(Ordering::Relaxed);
        let deadline = wait + DEADLINE * 2_u32.pow(doublings);
        let read = async {
            let mut connection = match idle {
                Some((_, connection)) => connection,
                None => EntryConnection::open(redis.client.get_connection_info()).await?,
            };
            let next = connection.next(source, after, wait, max_event_bytes).await;
            if matches!(&next, Ok(entry) if entry.as_ref().is_none_or(|e| e.oversized.is_none())) {
                let mut idle = self.idle();
                if idle.len() < IDLE {
                    idle.push((generation, connection));
                }
            }
            next
        };
        let began = Instant::now();
        let overdue = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                // A failover may have left this connection at a host that no longer answers.
                let is_late = began.elapsed() >= wait + DEADLINE
                    && redis.connection.generation() != generation;
                if is_late || began.elapsed() >= deadline {
                    return began.elapsed();
                }
            }
        };
        tokio::select! {
            next = read => {
                if next.is_ok() {
                    self.timeouts.store(0, Ordering::Relaxed);
                }
                next
            }
            waited = overdue => {
                self.note_timeout();
                Err(Error::Unavailable(format!("no answer within {} s", waited.as_secs())))
            }
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(u64, EntryConnection)>> {
        // The list is valid even if a thread panicked while holding the lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection.
struct EntryConnection {
    socket: Box<dyn Socket>,
    input: BytesMut,
}

impl EntryConnection {
    async fn open(info: &ConnectionInfo) -> Result<Self> {
        let mut connection = Self {
            socket: dial(info.addr()).await?,
            input: BytesMut::new(),
        };
        let settings = info.redis_settings();
        if let Some(password) = settings.password() {
            let words = [Some("AUTH"), settings.username(), Some(password)];
            let words: Vec<&[u8]> = words.into_iter().flatten().map(str::as_bytes).collect();
            connection.set_up(&words).await?;
        }
        if settings.db() != 0 {
            let database = settings.db().to_string();
            connection.set_up(&[b"SELECT", database.as_bytes()]).await?;
        }
        Ok(connection)
    }

    async fn set_up(&mut self, words: &[&[u8]]) -> Result<()> {
        self.send(words).await?;
        loop {
            let mut scanner = Scanner::new(&self.input);
            match scanner.line() {
                Ok((b'+', _)) => {
                    self.input.clear();
                    return Ok(());
                }
                Ok((b'-', line)) => return Err(refused(line)),
                Err(Stop::More) => self.receive().await?,
                Ok(_) | Err(Stop::Invalid) => return Err(invalid()),
            }
        }
    }

    async fn next(
        &mut self,
        source: &str,
        after: EntryId,
        wait: Duration,
        max_event_bytes: usize,
    ) -> Result<Option<Entry>> {
        let (after, wait_ms) = (after.to_string(), wait.as_millis().max(1).to_string());
        let mut words: Vec<&[u8]> = vec![b"XREAD", b"COUNT", b"1"];
        // `BLOCK 0` would wait forever.
        if !wait.is_zero() {
            words.extend([&b"BLOCK"[..], wait_ms.as_bytes()]);
        }
        words.extend([&b"STREAMS"[..], source.as_bytes(), after.as_bytes()]);
        self.send(&words).await?;
        loop {
            match answer(&self.input, max_event_bytes) {
                Ok(Answer::Entry(entry)) => {
                    self.input.clear();
                    return Ok(entry);
                }
                Ok(Answer::Refused(line)) => return Err(refused(&line)),
                Err(Stop::More) => self.receive().await?,
                Err(Stop::Invalid) => return Err(invalid()),
            }
        }
    }

    async fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut output = BytesMut::new();
        encode(&mut output, words);
        let sent = self.socket.write_all_buf(&mut output).await;
        sent.map_err(|error| Error::Unavailable(error.to_string()))
    }

    async fn receive(&mut self) -> Result<()> {
        self.input.reserve(16 * 1024);
        match self.socket.read_buf(&mut self.input).await {
            Ok(0) => Err(Error::Unavailable("Redis closed the connection".into())),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Unavailable(error.to_string())),
        }
    }
}

fn refused(line: &[u8]) -> Error {
    let line = String::from_utf8_lossy(line);
    let (code, detail) = line.split_once(' ').unwrap_or((&line, ""));
    explain(&redis::make_extension_error(
        code.to_owned(),
        Some(detail.to_owned()),
    ))
}

fn invalid() -> Error {
    Error::Unavailable("invalid RESP2 on a connection that waits for entries".into())
}

/// Why an answer cannot be parsed.
#[derive(Debug, PartialEq)]
enum Stop {
    /// It is not complete yet.
    More,
    Invalid,
}

#[derive(Debug, PartialEq)]
enum Answer {
    /// `None`: the wait ended without an entry.
    Entry(Option<Entry>),
    Refused(Vec<u8>),
}

/// Parses the answer to `XREAD COUNT 1`. Does not need the whole of an entry that is too large.
fn answer(input: &[u8], max_event_bytes: usize) -> Result<Answer, Stop> {
    let mut scanner = Scanner::new(input);
    match scanner.line()? {
        (b'-', line) => return Ok(Answer::Refused(line.to_vec())),
        (b'*' | b'$', b"-1") => return Ok(Answer::Entry(None)),
        (b'*', b"1") => {}
        _ => return Err(Stop::Invalid),
    }
    scanner.array_of(2)?;
    scanner.text()?;
    scanner.array_of(1)?;
    scanner.array_of(2)?;
    let id = std::str::from_utf8(scanner.text()?).map_err(|_| Stop::Invalid)?;
    let id: EntryId = parse_text(id).map_err(|_| Stop::Invalid)?;
    let n_fields = scanner.length(b'*')? / 2;
    let mut whole = scanner;
    let mut bytes = 0_usize;
    let mut texts = Vec::new();
    for _ in 0..2 * n_fields {
        let length = whole.length(b'$')?;
        bytes = bytes.saturating_add(length);
        if bytes > max_event_bytes || n_fields > MAX_ENTRY_FIELDS {
            return beginning(id, scanner, bytes, n_fields);
        }
        texts.push(Bytes::copy_from_slice(whole.take(length)?));
    }
    let fields = texts.chunks_exact(2);
    Ok(Answer::Entry(Some(Entry {
        id,
        fields: fields
            .map(|pair| (pair[0].clone(), pair[1].clone()))
            .collect(),
        oversized: None,
    })))
}

/// The beginning of an entry that is too large. `scanner` stands before its fields, `bytes` is the
/// size that is known so far.
fn beginning(
    id: EntryId,
    mut scanner: Scanner<'_>,
    bytes: usize,
    n_fields: usize,
) -> Result<Answer, Stop> {
    // The entry has more bytes than this: a limit is at least 1 KiB.
    if scanner.left().len() < EXCERPT_BYTES {
        return Err(Stop::More);
    }
    let mut fields = Vec::new();
    let mut part = || match scanner.length(b'$') {
        Ok(length) if length + 2 <= scanner.left().len() => scanner.take(length).ok(),
        Ok(length) => {
            let cut = scanner.left().get(..length).unwrap_or(scanner.left());
            scanner.at = scanner.input.len();
            Some(cut)
        }
        Err(_) => None,
    };
    while let Some(name) = part() {
        fields.push((name, part().unwrap_or_default()));
    }
    Ok(Answer::Entry(Some(Entry {
        id,
        fields: excerpt(fields),
        oversized: Some(Oversized {
            bytes: bytes as u64,
            fields: n_fields as u64,
            is_exact: false,
        }),
    })))
}

/// A position in an answer.
#[derive(Clone, Copy)]
struct Scanner<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    fn left(&self) -> &'a [u8] {
        self.input.get(self.at..).unwrap_or_default()
    }

    /// A header or error line: its first byte and the rest.
    fn line(&mut self) -> Result<(u8, &'a [u8]), Stop> {
        let left = self.left();
        let Some(end) = left.iter().take(1024).position(|&byte| byte == b'\n') else {
            return Err(if left.len() < 1024 {
                Stop::More
            } else {
                Stop::Invalid
            });
        };
        self.at += end + 1;
        match left.get(..end).and_then(|line| line.strip_suffix(b"\r")) {
            Some([sign, rest @ ..]) => Ok((*sign, rest)),
            _ => Err(Stop::Invalid),
        }
    }

    /// The length of an array (`*`) or of a text (`$`).
    fn length(&mut self, sign: u8) -> Result<usize, Stop> {
        match self.line()? {
            (found, digits) if found == sign => std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .ok_or(Stop::Invalid),
            _ => Err(Stop::Invalid),
        }
    }

    fn array_of(&mut self, n: usize) -> Result<(), Stop> {
        if self.length(b'*')? == n {
            Ok(())
        } else {
            Err(Stop::Invalid)
        }
    }

    fn text(&mut self) -> Result<&'a [u8], Stop> {
        let length = self.length(b'$')?;
        self.take(length)
    }

    /// The text whose header was read.
    fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let text = self.left().get(..length).ok_or(Stop::More)?;
        if self.left().len() < length + 2 {
            return Err(Stop::More);
        }
        self.at += length + 2;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
        let mut input = b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n5-1\r\n".to_vec();
        input.extend(format!("*{}\r\n", 2 * fields.len()).bytes());
        for text in fields.iter().flat_map(|(name, value)| [name, value]) {
            input.extend(format!("${}\r\n", text.len()).bytes());
            input.extend(*text);
            input.extend(b"\r\n");
        }
        input
    }

    /// The first answer, and the number of bytes of the input that it needed.
    fn first_answer(input: &[u8], max_event_bytes: usize) -> (Answer, usize) {
        (0..=input.len())
            .find_map(|n| match answer(&input[..n], max_event_bytes) {
                Ok(answer) => Some((answer, n)),
                Err(Stop::More) => None,
                Err(Stop::Invalid) => panic!("{n} bytes are invalid"),
            })
            .expect("an answer")
    }

    #[test]
    fn a_small_entry_is_read_as_a_whole_however_the_input_is_split() {
        let input = encoded(&[(b"type", b"t"), (b"", b"\r\n\xff"), (b"a", b"")]);
        let (answer, n) = first_answer(&input, 1_024);
        assert_eq!(n, input.len());
        let Answer::Entry(Some(entry)) = answer else {
            panic!("{answer:?}")
        };
        let fields: Vec<(&[u8], &[u8])> =
            entry.fields.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        assert_eq!(
            (entry.id, entry.oversized),
            (EntryId { ms: 5, seq: 1 }, None)
        );
        assert_eq!(
            fields,
            [(&b"type"[..], &b"t"[..]), (b"", b"\r\n\xff"), (b"a", b"")]
        );
    }

    #[test]
    fn of_a_large_entry_little_more_than_its_beginning_is_needed() {
        let (name, value) = (vec![b'n'; 300_000], vec![b'v'; 300_000]);
        for fields in [
            vec![(&b"type"[..], &b"t"[..]), (b"data", &value)],
            vec![(&name, b"")],
            vec![(&b""[..], &b""[..]); MAX_ENTRY_FIELDS + 1],
        ] {
            let input = encoded(&fields);
            let (answer, n) = first_answer(&input, 1_024);
            assert!(n < 2_000, "{n} bytes");
            let Answer::Entry(Some(entry)) = answer else {
                panic!("{answer:?}")
            };
            let size = entry.oversized.expect("it is too large");
            assert_eq!(size.fields, fields.len() as u64);
            let kept: usize = entry.fields.iter().map(|(a, b)| a.len() + b.len()).sum();
            assert!(kept <= EXCERPT_BYTES);
        }
    }

    #[test]
    fn the_end_of_a_wait_an_error_and_an_invalid_answer_are_recognised() {
        for nil in ["*-1\r\n", "$-1\r\n"] {
            assert_eq!(answer(nil.as_bytes(), 1_024), Ok(Answer::Entry(None)));
        }
        let error = answer(b"-WRONGTYPE a key\r\n", 1_024);
        assert_eq!(error, Ok(Answer::Refused(b"WRONGTYPE a key".to_vec())));
        for bad in ["+OK\r\n", "*2\r\n", "*1\r\n*3\r\n", ":1\r\n", "*1\n"] {
            assert_eq!(answer(bad.as_bytes(), 1_024), Err(Stop::Invalid), "{bad:?}");
        }
    }
}
