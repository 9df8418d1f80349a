//! Formats rows as aligned columns.

/// Each column is as wide as its widest cell, with two spaces between columns. The last column,
/// which may hold a sentence, is not padded.
pub(in crate::cli) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|at| match at {
        _ if at + 1 == N => 0,
        _ => rows
            .iter()
            .map(|row| row[at].chars().count())
            .max()
            .unwrap_or_default(),
    });
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    });
    lines.collect()
}
