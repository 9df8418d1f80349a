//! The admin listener: plugin commands, `explain`, and the OpenAPI document.

mod explain;
mod openapi;
mod plugin_admin;
