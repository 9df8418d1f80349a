//! Bounds how deep and how often the components, modules and types of a plugin file are nested.
//!
//! The validator, wit-component and wasmtime take time and memory for each pair of a component and
//! one that encloses it, and read nested types recursively: a file of 200 KB could otherwise take
//! all memory, or the stack. This pass runs before them, in linear time and without recursion. It
//! reports nothing else: what it cannot parse, the validator refuses with its own message.

use wasmparser::{
    BinaryReader, ComponentImport, ComponentType, InstanceTypeDeclaration, Parser, Payload,
};

/// The maximum depth of nested components and modules, and of nested types. Files of the known
/// toolchains have at most five levels.
const MAX_DEPTH: usize = 32;
/// The maximum number of components and modules in a file. Files made from Python have about 50.
const MAX_PARTS: usize = 1_000;

/// Checks a file that begins like WebAssembly.
///
/// # Errors
/// Why not, as the rest of a sentence that begins with the file name.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let (mut depth, mut n_parts) = (0, 0);
    for payload in Parser::new(0).parse_all(bytes).map_while(Result::ok) {
        match payload {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                (depth, n_parts) = (depth + 1, n_parts + 1);
                if depth > MAX_DEPTH {
                    return Err(format!(
                        "nests components more than {MAX_DEPTH} levels deep; flatten it"
                    ));
                }
                if n_parts > MAX_PARTS {
                    return Err(format!(
                        "has more than {MAX_PARTS} components and modules; merge them"
                    ));
                }
            }
            Payload::End(_) if depth > 0 => depth -= 1,
            Payload::ComponentTypeSection(section) => {
                if let Some(types) = bytes.get(section.range())
                    && nests_types_too_deep(types)
                {
                    return Err(format!(
                        "nests types more than {MAX_DEPTH} levels deep; flatten them"
                    ));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a type section nests component and instance types deeper than the limit, as far as it
/// can be parsed.
fn nests_types_too_deep(section: &[u8]) -> bool {
    const COMPONENT: u8 = 0x41;
    const INSTANCE: u8 = 0x42;
    const TYPE: u8 = 0x01;
    const IMPORT: u8 = 0x03;
    let mut reader = BinaryReader::new(section, 0);
    let Ok(n_types) = reader.read_var_u32() else {
        return false;
    };
    // For each level, the number of declarations that are left.
    let mut levels = vec![n_types];
    while let Some(left) = levels.last_mut() {
        let Some(fewer) = left.checked_sub(1) else {
            levels.pop();
            continue;
        };
        *left = fewer;
        // The section itself lists types; a component or instance type lists declarations, some of
        // which are types.
        let first = section.get(reader.original_position());
        let is_type = levels.len() == 1 || first == Some(&TYPE);
        if levels.len() > 1 && is_type && reader.read_u8().is_err() {
            return false;
        }
        let first = section.get(reader.original_position());
        let is_read = if !is_type {
            if first == Some(&IMPORT) {
                reader.read_u8().is_ok() && reader.read::<ComponentImport<'_>>().is_ok()
            } else {
                reader.read::<InstanceTypeDeclaration<'_>>().is_ok()
            }
        } else if matches!(first, Some(&COMPONENT | &INSTANCE)) {
            if levels.len() > MAX_DEPTH {
                return true;
            }
            let count = reader.read_u8().and_then(|_| reader.read_var_u32());
            count.map(|count| levels.push(count)).is_ok()
        } else {
            reader.read::<ComponentType<'_>>().is_ok()
        };
        if !is_read {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sections of a component with their header.
    fn component(sections: &[u8]) -> Vec<u8> {
        [b"\0asm\x0d\0\x01\0", sections].concat()
    }

    fn section(id: u8, content: &[u8]) -> Vec<u8> {
        let mut section = vec![id];
        let mut n = content.len();
        while n >= 0x80 {
            section.push((n % 0x80) as u8 | 0x80);
            n /= 0x80;
        }
        section.push(n as u8);
        section.extend_from_slice(content);
        section
    }

    fn nested(depth: usize) -> Vec<u8> {
        (0..depth).fold(component(&[]), |inner, _| component(&section(4, &inner)))
    }

    /// A component type that contains a component type, and so on.
    fn nested_types(depth: usize) -> Vec<u8> {
        let mut types = vec![1];
        for _ in 1..depth {
            types.extend([0x41, 1, 1]);
        }
        types.extend([0x41, 0]);
        component(&section(7, &types))
    }

    #[test]
    fn deep_and_numerous_components_and_types_are_refused() {
        let of = |text: &str| check(&wat::parse_str(text).unwrap());
        assert_eq!(check(&nested(MAX_DEPTH)), Ok(()));
        let deep = check(&nested(MAX_DEPTH + 1)).unwrap_err();
        assert!(deep.contains("nests components more than 32"), "{deep}");
        assert_eq!(check(&nested_types(MAX_DEPTH)), Ok(()));
        for depth in [MAX_DEPTH + 1, 100_000] {
            let deep = check(&nested_types(depth)).unwrap_err();
            assert!(deep.contains("nests types more than 32"), "{deep}");
        }
        let many = of(&format!("(component {})", "(component)".repeat(1_001))).unwrap_err();
        assert!(many.contains("has more than 1000 components"), "{many}");
        let wide = r#"(component $c
            (type $r (resource (rep i32)))
            (type (component
                (import "a" (instance (type $t (list u8)) (export "x" (type (eq $t)))))
                (alias outer $c $r (type $outer))
                (core type (module))
                (type $f (func (param "a" string)))
                (export "b" (func (type $f)))))
            (type (record (field "a" u8))))"#;
        assert_eq!(of(wide), Ok(()));
    }
}
