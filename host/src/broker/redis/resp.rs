//! The part of the Redis protocol (RESP2) that a Pub/Sub connection uses: sends commands, receives
//! flat arrays.
//!
//! Input is bounded: a text longer than a limit, by default [`LONGEST_TEXT`], is skipped as it
//! arrives and never buffered.

use bytes::{Buf, Bytes, BytesMut};

/// Longer than any channel name or notice that Pointsman publishes, in bytes.
const LONGEST_TEXT: usize = 64 * 1024;
/// Maximum length of a header or error line, in bytes.
const LONGEST_LINE: usize = 1024;
/// Maximum number of elements of an array; a notice has 3.
const MOST_ELEMENTS: usize = 8;

/// An element of an array.
#[derive(Debug, PartialEq)]
pub enum Element {
    Text(Bytes),
    Number(i64),
    Nil,
    /// Skipped because it was longer than the limit of the [`Decoder`].
    TooLong,
}

/// A reply or a message.
#[derive(Debug, PartialEq)]
pub enum Frame {
    Simple(Bytes),
    Error(Bytes),
    Array(Vec<Element>),
}

/// The peer does not speak RESP2, or sent something that is not valid on a Pub/Sub connection.
#[derive(Debug, thiserror::Error)]
#[error("invalid RESP2 on a Pub/Sub connection: {0}")]
pub struct FrameError(&'static str);

/// Extracts frames from the received bytes.
#[derive(Debug)]
pub struct Decoder {
    /// The longest text that is buffered, in bytes.
    longest_text: usize,
    /// The elements of the current array received so far.
    elements: Vec<Element>,
    /// The number of elements still missing from it; 0 between frames.
    missing: usize,
    /// The remaining bytes of a text that is being skipped.
    skipping: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::with_limit(LONGEST_TEXT)
    }
}

impl Decoder {
    /// A decoder that skips texts of more than `longest_text` bytes.
    pub fn with_limit(longest_text: usize) -> Self {
        Self {
            longest_text,
            elements: Vec::new(),
            missing: 0,
            skipping: 0,
        }
    }

    /// Returns the next frame, or `None` if it is not complete yet. Removes consumed bytes from
    /// `input`.
    ///
    /// # Errors
    /// [`FrameError`]; the connection is of no further use.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
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
                        Err(FrameError("a line is too long"))
                    } else {
                        Ok(None)
                    };
                };
                if line_end < 2 || input[line_end - 1] != b'\r' {
                    return Err(FrameError("a line is malformed"));
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
                        self.missing = elements.ok_or(FrameError("invalid length of an array"))?;
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
                        Ok(length) if length > self.longest_text => {
                            input.advance(line_end + 1);
                            self.skipping = length
                                .checked_add(2)
                                .ok_or(FrameError("invalid length of a text"))?;
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
                    _ => return Err(FrameError("unknown type of a frame")),
                }
            }
            if self.missing == 0 {
                return Ok(Some(Frame::Array(std::mem::take(&mut self.elements))));
            }
        }
    }
}

fn number(line: &[u8]) -> Result<i64, FrameError> {
    std::str::from_utf8(line)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(FrameError("invalid number"))
}

/// Appends a command to `output`.
pub fn encode(output: &mut BytesMut, words: &[&[u8]]) {
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

    fn decode(input: &[u8], piece: usize) -> Result<Vec<Frame>, FrameError> {
        let (mut decoder, mut buffer, mut frames) =
            (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in input.chunks(piece) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut buffer)? {
                frames.push(frame);
            }
            assert!(
                buffer.len() <= LONGEST_TEXT + LONGEST_LINE,
                "the decoder buffers {} bytes",
                buffer.len()
            );
        }
        Ok(frames)
    }

    #[test]
    fn frames_do_not_depend_on_how_the_input_is_split() {
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
    fn a_text_that_is_too_long_is_skipped_and_not_buffered() {
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
    fn invalid_resp_is_rejected() {
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
        // A huge length reserves no memory; the decoder just waits for input.
        assert!(
            decode(b"*1\r\n$9223372036854775807\r\n", 3)
                .unwrap()
                .is_empty()
        );
        assert!(decode(&[b'x'; 5_000], 100).is_err());
    }

    #[test]
    fn a_command_is_encoded_as_an_array_of_texts() {
        let mut output = BytesMut::new();
        encode(&mut output, &[b"SUBSCRIBE", b"a b\r\n"]);
        assert_eq!(&output[..], b"*2\r\n$9\r\nSUBSCRIBE\r\n$5\r\na b\r\n\r\n");
    }
}
