//! The command line: commands for operators, commands for plugin authors, and the demo.

mod commands;
mod demo;
mod plugin_cli;
mod reference;
