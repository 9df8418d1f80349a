//! The code that wit-bindgen makes of `wit/`: the only place with its name.
//!
//! One world for each export, not the three of `wit/`: their export macros would have the same names for what they share. A plugin that
//! calls two of these macros has the union of the two worlds, which is a world of `wit/`.

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
