//! Maps the traits to WebAssembly exports: the expansion of [`export!`](macro@crate::export), and
//! the lifecycle functions that are the same for every plugin.

use std::marker::PhantomData;
use std::panic;
use std::sync::Once;

use crate::bindings::{filter, lifecycle, router};
use crate::configuration::create_plugin;
use crate::{Event, Filter, Interest, Issue, Plugin, Route, Router, Verdict, log};
use lifecycle::exports::pointsman::plugin::lifecycle::{Manifest, Selection};
use lifecycle::pointsman::plugin::types;

/// Exports a plugin to the host: `export!(MyFilter as filter);`, `export!(MyRouter as router);` or
/// `export!(MyPlugin as filter and router);`. Call it once per crate. The plugin takes its name,
/// version and description from the crate.
#[macro_export]
macro_rules! export {
    ($plugin:ty as filter) => {
        $crate::export!(@plugin $plugin, [filter::export_filter], [$crate::Filter]);
    };
    ($plugin:ty as router) => {
        $crate::export!(@plugin $plugin, [router::export_router], [$crate::Router]);
    };
    ($plugin:ty as filter and router) => {
        $crate::export!(@plugin $plugin, [filter::export_filter, router::export_router], [$crate::Filter, $crate::Router]);
    };
    (@plugin $plugin:ty, [$($world:ident :: $export:ident),+], [$($kind:path),+]) => {
        impl $crate::rt::Exported for $plugin {
            const NAME: &'static str = env!("CARGO_PKG_NAME");
            const VERSION: &'static str = env!("CARGO_PKG_VERSION");
            const DESCRIPTION: &'static str = env!("CARGO_PKG_DESCRIPTION");

            fn with_slot<R>(f: impl FnOnce(&mut Option<Self>) -> R) -> R {
                thread_local! {
                    static SLOT: ::std::cell::RefCell<Option<$plugin>> = const { ::std::cell::RefCell::new(None) };
                }
                SLOT.with_borrow_mut(f)
            }
        }

        // Makes `cargo check` report a missing trait implementation without the wasm target.
        const _: fn() = || {
            fn is_exportable<T: $crate::rt::Exported $(+ $kind)+>() {}
            is_exportable::<$plugin>();
        };

        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Component = $crate::rt::Component<$plugin>;
            $crate::rt::lifecycle::export_lifecycle!(Component with_types_in $crate::rt::lifecycle);
            $( $crate::rt::$world::$export!(Component with_types_in $crate::rt::$world); )+
        };
    };
    ($($other:tt)*) => {
        ::core::compile_error!(
            "export! takes one of these forms: `export!(MyFilter as filter);`, `export!(MyRouter as router);`, `export!(MyPlugin as filter and router);`"
        );
    };
}

/// A plugin together with the storage of its single instance. Implemented by
/// [`export!`](macro@crate::export).
pub trait Exported: Plugin {
    const NAME: &'static str;
    const VERSION: &'static str;
    const DESCRIPTION: &'static str;

    fn with_slot<R>(f: impl FnOnce(&mut Option<Self>) -> R) -> R;
}

/// Implements the interfaces of `wit/` for a plugin.
#[derive(Debug)]
pub struct Component<P>(PhantomData<P>);

impl<P: Exported> lifecycle::exports::pointsman::plugin::lifecycle::Guest for Component<P> {
    fn describe() -> Manifest {
        report_panics();
        let Interest {
            types,
            attributes,
            fields,
            payload,
        } = P::with_slot(|slot| slot.as_ref().map(P::interest)).unwrap_or_default();
        Manifest {
            name: P::NAME.into(),
            version: P::VERSION.into(),
            description: P::DESCRIPTION.into(),
            types,
            reads: Selection {
                attributes,
                fields,
                payload,
            },
            config_schema: serde_json::to_string(&schemars::schema_for!(P::Config)).ok(),
            options: Vec::new(),
        }
    }

    fn configure(config: String) -> Result<(), Vec<Issue>> {
        report_panics();
        let plugin = create_plugin::<P>(&config)?;
        P::with_slot(|slot| *slot = Some(plugin));
        Ok(())
    }
}

impl<P: Exported + Filter> filter::exports::pointsman::plugin::filter::Guest for Component<P> {
    fn evaluate(event: types::Event) -> Result<Verdict, types::Failure> {
        Ok(with_plugin(|plugin: &P| {
            plugin.evaluate(&Event::from(event))
        })?)
    }
}

impl<P: Exported + Router> router::exports::pointsman::plugin::router::Guest for Component<P> {
    fn resolve(event: types::Event) -> Result<Vec<Route>, types::Failure> {
        Ok(with_plugin(|plugin: &P| {
            plugin.resolve(&Event::from(event))
        })?)
    }
}

fn with_plugin<P: Exported, R>(f: impl FnOnce(&P) -> R) -> R {
    P::with_slot(|slot| {
        f(slot
            .as_ref()
            .expect("the host configures an instance before its first event"))
    })
}

/// Logs the text of a panic before the trap: on `wasm32-unknown-unknown` it would otherwise be
/// lost.
fn report_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        panic::set_hook(Box::new(|info| {
            let message = info.payload_as_str().unwrap_or("(no message)");
            match info.location() {
                Some(place) => log::error(format_args!(
                    "panicked at {}:{}: {message}",
                    place.file(),
                    place.line()
                )),
                None => log::error(format_args!("panicked: {message}")),
            }
        }));
    });
}
