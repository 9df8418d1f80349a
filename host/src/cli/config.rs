//! `pointsman check-config` and `pointsman config --defaults`.

use pointsman::config::{BrokerChoice, DEFAULTS};

use super::serve;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Every key with its default, as a pointsman.toml
    #[arg(long, required = true)]
    defaults: bool,
}

pub(super) fn print(options: &Options) -> anyhow::Result<()> {
    if options.defaults {
        print!("{DEFAULTS}");
    }
    Ok(())
}

pub(super) fn check(options: &serve::Options) -> anyhow::Result<()> {
    let config = options.load()?;
    let broker = match &config.broker {
        // The URL may hold a password.
        BrokerChoice::Redis { .. } => "a Redis".to_owned(),
        BrokerChoice::Data(folder) => format!("the embedded one in {}", folder.display()),
        BrokerChoice::Ephemeral => "the embedded one in memory".to_owned(),
    };
    println!(
        "well: listens on {} and {}, broker is {broker}, sources are {}",
        config.listen.address,
        config.listen.admin,
        config.sources.join(", ")
    );
    Ok(())
}
