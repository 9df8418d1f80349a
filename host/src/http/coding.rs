//! The content codings of request bodies (RFC 9110, section 8.4.1): which ones a route accepts, and
//! inflating a body within the bound of its size.
//!
//! Performs no I/O. `body` reads the compressed bytes, and charges what they inflate to.

use std::io::{self, Read};

use axum::http::HeaderMap;
use axum::http::header::CONTENT_ENCODING;
use bytes::buf::Reader;
use bytes::{Buf as _, Bytes};
use flate2::bufread::{DeflateDecoder, GzDecoder, ZlibDecoder};

/// The codings that publishers may use, as in `Accept-Encoding`.
pub(super) const INFLATED: &str = "gzip, deflate";

/// The content coding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    Deflate,
}

impl Coding {
    /// `None` for any other coding, and for several: each would multiply what a byte inflates to.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(CONTENT_ENCODING).iter();
        let value = values
            .next()
            .map_or("identity", |value| value.to_str().unwrap_or_default());
        if values.next().is_some() {
            return None;
        }
        match value.trim().to_ascii_lowercase().as_str() {
            "identity" => Some(Self::Identity),
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }

    /// Returns what inflates the body, or `None` if it is not compressed.
    pub(super) fn inflate(self, body: &Bytes) -> Option<Inflate> {
        let reader = || body.clone().reader();
        match self {
            Self::Identity => None,
            // One member, as every client sends: hundreds of thousands of empty ones would take
            // seconds to read and inflate to nothing.
            Self::Gzip => Some(Inflate::Gzip(GzDecoder::new(reader()))),
            Self::Deflate if has_zlib_header(body) => {
                Some(Inflate::Zlib(ZlibDecoder::new(reader())))
            }
            Self::Deflate => Some(Inflate::Raw(DeflateDecoder::new(reader()))),
        }
    }
}

/// The specification requires the zlib format; some clients have always sent the bare one.
fn has_zlib_header(body: &[u8]) -> bool {
    matches!(*body, [cmf, flags, ..]
        if cmf & 0x0f == 8 && (u16::from(cmf) << 8 | u16::from(flags)) % 31 == 0)
}

/// Inflates a body piece by piece.
#[derive(Debug)]
pub(super) enum Inflate {
    Gzip(GzDecoder<Reader<Bytes>>),
    Zlib(ZlibDecoder<Reader<Bytes>>),
    Raw(DeflateDecoder<Reader<Bytes>>),
}

impl Inflate {
    /// Inflates at most as many bytes as `into` has, and returns their number: 0 at the end of a
    /// complete body.
    ///
    /// # Errors
    /// The body is damaged, ends early, or has bytes after its end.
    pub(super) fn next(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (n, rest) = match self {
            Self::Gzip(gzip) => (gzip.read(into)?, gzip.get_ref()),
            Self::Zlib(zlib) => (zlib.read(into)?, zlib.get_ref()),
            Self::Raw(raw) => (raw.read(into)?, raw.get_ref()),
        };
        if n == 0 && rest.get_ref().has_remaining() {
            return Err(io::Error::other("bytes follow its end"));
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use axum::http::HeaderValue;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    fn read(coding: Coding, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut inflate = coding.inflate(&Bytes::copy_from_slice(body)).unwrap();
        let (mut all, mut piece) = (Vec::new(), [0; 7]);
        loop {
            match inflate.next(&mut piece)? {
                0 => return Ok(all),
                n => all.extend_from_slice(&piece[..n]),
            }
        }
    }

    #[test]
    fn each_format_is_inflated_and_damage_of_any_kind_is_an_error() {
        let text = b"{\"type\":\"order.shipped\",\"user\":\"42\"}".repeat(20);
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&text).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(&text).unwrap();
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::default());
        raw.write_all(&text).unwrap();
        for (coding, body) in [
            (Coding::Gzip, gzip.finish().unwrap()),
            (Coding::Deflate, zlib.finish().unwrap()),
            (Coding::Deflate, raw.finish().unwrap()),
        ] {
            assert_eq!(read(coding, &body).unwrap(), text);
            for n in 0..body.len() {
                assert!(
                    read(coding, &body[..n]).is_err(),
                    "{coding:?} cut to {n} bytes"
                );
            }
            assert!(read(coding, &[body.as_slice(), b"{}"].concat()).is_err());
        }
    }

    #[test]
    fn one_coding_is_read_and_no_list() {
        let of = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(CONTENT_ENCODING, HeaderValue::from_static(value));
            }
            Coding::of(&headers)
        };
        assert_eq!(of(&[]), Some(Coding::Identity));
        assert_eq!(of(&["GZip"]), Some(Coding::Gzip));
        assert_eq!(of(&["deflate"]), Some(Coding::Deflate));
        for other in [
            &["br"][..],
            &["gzip, gzip"],
            &["gzip", "gzip"],
            &[""],
            &["identity", "gzip"],
        ] {
            assert_eq!(of(other), None, "{other:?}");
        }
    }
}
