//! The seeds of randomised tests. Each is printed, so that `POINTSMAN_TEST_SEED` can repeat a
//! failing run.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// The random generator of one test, and its seed.
///
/// # Panics
/// If `POINTSMAN_TEST_SEED` is set and not a number.
pub(crate) fn generator(test: &str) -> (StdRng, u64) {
    let seed = seed(test);
    (StdRng::seed_from_u64(seed), seed)
}

/// The seed of one test: `POINTSMAN_TEST_SEED`, or a random number.
///
/// # Panics
/// Like [`generator`].
pub(crate) fn seed(test: &str) -> u64 {
    let seed = match std::env::var("POINTSMAN_TEST_SEED") {
        Ok(text) => text.parse().expect("POINTSMAN_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    eprintln!("{test}: POINTSMAN_TEST_SEED={seed}");
    seed
}
