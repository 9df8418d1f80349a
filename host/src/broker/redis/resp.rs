//! The Redis protocol (RESP2), as far as a Pub/Sub connection speaks it: commands out, flat arrays in.
//!
//! What comes in is bounded: a text longer than [`LONGEST_TEXT`], which only a stranger can have published, is skipped as it arrives and
//! never held.

use bytes::{Buf, Bytes, BytesMut};

/// Longer than every channel name and notice of ours.
const LONGEST_TEXT: usize = 64 * 1024;
/// A header line is a sign and a number, an error a sentence.
const LONGEST_LINE: usize = 1024;
/// A notice has 3 elements.
const MOST_ELEMENTS: usize = 8;

#[derive(Debug, PartialEq)]
pub(super) enum Element {
    Text(Bytes),
    Number(i64),
    Nil,
    /// Skipped, because it was longer than [`LONGEST_TEXT`].
    TooLong,
}

#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    Simple(Bytes),
    Error(Bytes),
    Array(Vec<Element>),
}

/// The other side does not speak RESP2, or not as Pub/Sub does.
#[derive(Debug, thiserror::Error)]
#[error("what came is no RESP2 of a Pub/Sub connection: {0}")]
pub(super) struct Garbled(&'static str);

/// Cuts frames out of what was read.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// What stands of the present array.
    elements: Vec<Element>,
    /// How many of its elements are missing; 0 between frames.
    missing: usize,
    /// Bytes of a text that is too long, still to come.
    skipping: usize,
}

impl Decoder {
    /// The next frame. `None`: the rest of it has yet to arrive; what was used of `input` is gone from it.
    pub(super) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, Garbled> {
        loop {
            if self.skipping > 0 {
                let now = self.skipping.min(input.len());
                input.advance(now);
                self.skipping -= now;
                if self.skipping > 0 {
                    return Ok(None);
                }
                self.elements.push(Element::TooLong);
                self.missing -= 1;
            } else {
                let Some(line_end) = input.iter().take(LONGEST_LINE).position(|&b| b == b'\n')
                else {
                    return if input.len() >= LONGEST_LINE {
                        Err(Garbled("a line is too long"))
                    } else {
                        Ok(None)
                    };
                };
                if line_end < 2 || input[line_end - 1] != b'\r' {
                    return Err(Garbled("a line does not begin or end as it must"));
                }
                let (sign, line) = (input[0], &input[1..line_end - 1]);
                match sign {
                    b'+' | b'-' if self.missing == 0 => {
                        let line = Bytes::copy_from_slice(line);
                        input.advance(line_end + 1);
                        return Ok(Some(if sign == b'+' {
                            Frame::Simple(line)
                        } else {
                            Frame::Error(line)
                        }));
                    }
                    b'*' if self.missing == 0 => {
                        let elements = usize::try_from(number(line)?)
                            .ok()
                            .filter(|n| (1..=MOST_ELEMENTS).contains(n));
                        self.missing = elements.ok_or(Garbled("an array has a wrong length"))?;
                        input.advance(line_end + 1);
                        continue;
                    }
                    b':' if self.missing > 0 => {
                        let number = number(line)?;
                        input.advance(line_end + 1);
                        self.elements.push(Element::Number(number));
                        self.missing -= 1;
                    }
                    b'$' if self.missing > 0 => match usize::try_from(number(line)?) {
                        Err(_) => {
                            input.advance(line_end + 1);
                            self.elements.push(Element::Nil);
                            self.missing -= 1;
                        }
                        Ok(length) if length > LONGEST_TEXT => {
                            input.advance(line_end + 1);
                            self.skipping = length
                                .checked_add(2)
                                .ok_or(Garbled("a text has a wrong length"))?;
                            continue;
                        }
                        Ok(length) => {
                            if input.len() < line_end + 1 + length + 2 {
                                return Ok(None);
                            }
                            input.advance(line_end + 1);
                            let text = input.split_to(length).freeze();
                            input.advance(2);
                            self.elements.push(Element::Text(text));
                            self.missing -= 1;
                        }
                    },
                    _ => return Err(Garbled("a frame begins with an unknown sign")),
                }
            }
            if self.missing == 0 {
                return Ok(Some(Frame::Array(std::mem::take(&mut self.elements))));
            }
        }
    }
}

fn number(line: &[u8]) -> Result<i64, Garbled> {
    std::str::from_utf8(line)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(Garbled("a number is none"))
}

/// Writes a command.
pub(super) fn encode(output: &mut BytesMut, words: &[&[u8]]) {
    output.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        output.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        output.extend_from_slice(word);
        output.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &'static str) -> Element {
        Element::Text(Bytes::from_static(s.as_bytes()))
    }

    fn decode(input: &[u8], piece: usize) -> Result<Vec<Frame>, Garbled> {
        let (mut decoder, mut buffer, mut frames) =
            (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in input.chunks(piece) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut buffer)? {
                frames.push(frame);
            }
            assert!(
                buffer.len() <= LONGEST_TEXT + LONGEST_LINE,
                "it holds {} bytes",
                buffer.len()
            );
        }
        Ok(frames)
    }

    #[test]
    fn frames_are_the_same_however_they_are_cut_into_pieces() {
        let input = b"+OK\r\n*3\r\n$9\r\nsubscribe\r\n$4\r\ntick\r\n:1\r\n*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$4\r\n\r\n\0x\r\n*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n-ERR no\r\n";
        let expect = [
            Frame::Simple(Bytes::from_static(b"OK")),
            Frame::Array(vec![text("subscribe"), text("tick"), Element::Number(1)]),
            Frame::Array(vec![text("message"), text("c"), text("\r\n\0x")]),
            Frame::Array(vec![text("unsubscribe"), Element::Nil, Element::Number(0)]),
            Frame::Error(Bytes::from_static(b"ERR no")),
        ];
        for piece in 1..=input.len() {
            assert_eq!(
                decode(input, piece).unwrap(),
                expect,
                "in pieces of {piece}"
            );
        }
    }

    #[test]
    fn a_text_that_is_too_long_is_skipped_and_not_held() {
        let length = LONGEST_TEXT + 1;
        let mut input = format!("*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n${length}\r\n").into_bytes();
        input.extend(std::iter::repeat_n(b'x', length));
        input.extend_from_slice(b"\r\n+OK\r\n");
        let expect = [
            Frame::Array(vec![text("message"), text("c"), Element::TooLong]),
            Frame::Simple(Bytes::from_static(b"OK")),
        ];
        for piece in [1_000, 4_096, input.len()] {
            assert_eq!(decode(&input, piece).unwrap(), expect);
        }
    }

    #[test]
    fn what_is_no_resp_is_refused() {
        for bad in [
            "HTTP/1.1 400 Bad Request\r\n",
            "*2000000000\r\n",
            "*1\r\n*1\r\n",
            "*-1\r\n",
            "\r\n",
            "+OK\n",
            "*1\r\n$x\r\n",
        ] {
            assert!(decode(bad.as_bytes(), 3).is_err(), "{bad:?}");
        }
        // A length that nothing will ever fill is waited for, and nothing reserved for it.
        assert!(
            decode(b"*1\r\n$9223372036854775807\r\n", 3)
                .unwrap()
                .is_empty()
        );
        assert!(decode(&[b'x'; 5_000], 100).is_err());
    }

    #[test]
    fn a_command_is_an_array_of_texts() {
        let mut output = BytesMut::new();
        encode(&mut output, &[b"SUBSCRIBE", b"a b\r\n"]);
        assert_eq!(&output[..], b"*2\r\n$9\r\nSUBSCRIBE\r\n$5\r\na b\r\n\r\n");
    }
}
