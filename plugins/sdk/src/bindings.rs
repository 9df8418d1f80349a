//! The code that wit-bindgen generates from `wit/`. No other module names wit-bindgen.
//!
//! There is one world per export rather than the three worlds of `wit/`, because their export
//! macros would define the same names for the parts they share. A plugin that calls two of these
//! macros implements the union of the two worlds, which is itself a world of `wit/`.

pub mod lifecycle {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package pointsman:sdk;
            world lifecycle-world {
                import pointsman:plugin/types@0.1.0;
                import pointsman:plugin/log@0.1.0;
                import pointsman:plugin/clock@0.1.0;
                export pointsman:plugin/lifecycle@0.1.0;
            }
        ",
        generate_all,
        generate_unused_types: true,
        additional_derives: [PartialEq],
        pub_export_macro: true,
        export_macro_name: "export_lifecycle",
    });
}

pub mod filter {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package pointsman:sdk;
            world filter-world {
                export pointsman:plugin/filter@0.1.0;
            }
        ",
        with: { "pointsman:plugin/types@0.1.0": crate::bindings::lifecycle::pointsman::plugin::types },
        additional_derives: [PartialEq],
        pub_export_macro: true,
        export_macro_name: "export_filter",
    });
}

pub mod router {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package pointsman:sdk;
            world router-world {
                export pointsman:plugin/router@0.1.0;
            }
        ",
        with: { "pointsman:plugin/types@0.1.0": crate::bindings::lifecycle::pointsman::plugin::types },
        additional_derives: [PartialEq],
        pub_export_macro: true,
        export_macro_name: "export_router",
    });
}
