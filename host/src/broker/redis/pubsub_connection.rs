//! A connection in Pub/Sub mode, below the notices of a node ([`super::feed`]) and the messages of
//! applications ([`super::channels`]): socket, authentication and RESP2 frames.

use bytes::BytesMut;
use redis::{ConnectionAddr, ConnectionInfo};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use super::resp::{Decoder, Frame, encode};
use crate::broker::{Error, Result};

/// Maximum number of bytes per read of the socket.
pub(super) const READ_BYTES: usize = 64 * 1024;

pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// See the head of this file.
pub(super) struct PubSubConnection {
    pub(super) socket: Box<dyn Socket>,
    pub(super) decoder: Decoder,
    pub(super) input: BytesMut,
    /// Commands that are not written yet.
    pub(super) output: BytesMut,
}

impl PubSubConnection {
    /// Connects and authenticates. `decoder` bounds the messages.
    pub(super) async fn open(info: &ConnectionInfo, decoder: Decoder) -> Result<Self> {
        let mut connection = Self {
            socket: dial(info.addr()).await?,
            decoder,
            input: BytesMut::with_capacity(READ_BYTES),
            output: BytesMut::new(),
        };
        connection.authenticate(info).await?;
        Ok(connection)
    }

    async fn authenticate(&mut self, info: &ConnectionInfo) -> Result<()> {
        let settings = info.redis_settings();
        let Some(password) = settings.password() else {
            return Ok(());
        };
        let words = [Some("AUTH"), settings.username(), Some(password)];
        encode(
            &mut self.output,
            &words
                .into_iter()
                .flatten()
                .map(str::as_bytes)
                .collect::<Vec<_>>(),
        );
        self.flush().await?;
        match self.frame().await? {
            Frame::Simple(_) => Ok(()),
            Frame::Error(why) => Err(Error::Permanent(format!(
                "{}; correct user and password in the URL",
                String::from_utf8_lossy(&why)
            ))),
            Frame::Array(_) => Err(Error::Unavailable("unexpected answer to AUTH".into())),
        }
    }

    /// Writes all of `output`. Cancel-safe: the rest stays there.
    pub(super) async fn flush(&mut self) -> Result<()> {
        let sent = self.socket.write_all_buf(&mut self.output).await;
        sent.map_err(|error| Error::Unavailable(error.to_string()))
    }

    /// The next frame that is already received, if it is complete.
    pub(super) fn received(&mut self) -> Result<Option<Frame>> {
        self.decoder
            .next(&mut self.input)
            .map_err(|error| Error::Unavailable(error.to_string()))
    }

    /// Reads once from the socket. Cancel-safe.
    pub(super) async fn read(&mut self) -> Result<()> {
        self.input.reserve(READ_BYTES);
        match self.socket.read_buf(&mut self.input).await {
            Ok(0) => Err(Error::Unavailable("Redis closed the connection".into())),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Unavailable(error.to_string())),
        }
    }

    /// Waits for the next frame. Cancel-safe.
    pub(super) async fn frame(&mut self) -> Result<Frame> {
        loop {
            if let Some(frame) = self.received()? {
                return Ok(frame);
            }
            self.read().await?;
        }
    }
}

pub(super) async fn dial(address: &ConnectionAddr) -> Result<Box<dyn Socket>> {
    let unavailable = |error: std::io::Error| Error::Unavailable(error.to_string());
    match address {
        ConnectionAddr::Tcp(host, port) => {
            let socket = TcpStream::connect((host.as_str(), *port))
                .await
                .map_err(unavailable)?;
            socket.set_nodelay(true).map_err(unavailable)?;
            Ok(Box::new(socket))
        }
        ConnectionAddr::Unix(path) => Ok(Box::new(
            UnixStream::connect(path).await.map_err(unavailable)?,
        )),
        _ => Err(Error::Permanent(
            "TLS is not supported; write redis:// instead of rediss://".into(),
        )),
    }
}
