//! The heap of a plugin. Freed small blocks are kept in lists by size and reused before the
//! underlying allocator is called.
//!
//! A plugin that reads a payload allocates and frees some hundred small blocks per event. Natively
//! the C library serves them from such lists. Rust's default allocator for WebAssembly searches,
//! splits and merges on every call instead, which takes a fifth of the parsing time (`make bench`).
//! Data that the host passes in is allocated here as well: `cabi_realloc` (from wit-bindgen or, on
//! WASI, from the standard library) calls the global allocator.
//!
//! The cost: small blocks are never merged with their neighbours, so for each size a plugin holds
//! on to its peak usage until its instance is replaced, which the host does from time to time
//! anyway.

#![expect(unsafe_code, reason = "an allocator handles raw memory")]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr;

/// The largest block that is kept by size, in bytes. The nodes of the maps in `serde_json::Value`
/// take about 400.
const MAX_SMALL: usize = 512;
/// Sizes are rounded up to a multiple of this many bytes.
const STEP: usize = 16;
/// The alignment of a small block. Blocks that need a larger alignment are not kept.
const ALIGN: usize = align_of::<u64>();

/// Lists of free blocks, one per size, in front of another allocator.
pub(crate) struct Heap<A> {
    /// The first free block of each size. The first bytes of a free block hold the pointer to the
    /// next one.
    free: UnsafeCell<[*mut u8; MAX_SMALL / STEP + 1]>,
    beneath: A,
}

// SAFETY: the static instance is used only in programs without threads, and the tests do not share
// an instance between threads.
unsafe impl<A> Sync for Heap<A> {}

#[cfg(target_arch = "wasm32")]
#[global_allocator]
static HEAP: Heap<std::alloc::System> = Heap::above(std::alloc::System);

impl<A> Heap<A> {
    pub(crate) const fn above(beneath: A) -> Self {
        Self {
            free: UnsafeCell::new([ptr::null_mut(); MAX_SMALL / STEP + 1]),
            beneath,
        }
    }

    /// The index of the list for blocks of this layout; `None` if they are not kept.
    #[inline]
    const fn class(layout: Layout) -> Option<usize> {
        if layout.size() <= MAX_SMALL && layout.align() <= ALIGN {
            Some(layout.size().div_ceil(STEP))
        } else {
            None
        }
    }
}

// SAFETY: a block of a class is as large and as aligned as any layout of that class requires, comes
// from `beneath` exactly once and is in exactly one place: with the caller or in the list of its
// class. A layout always maps to the same class, so every other block is returned to the allocator
// from which it came.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Heap<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = Self::class(layout) else {
            // SAFETY: guaranteed by the caller.
            return unsafe { self.beneath.alloc(layout) };
        };
        // SAFETY: access to the lists is exclusive, because no threads exist and nothing here
        // calls back. A block in a list is free, so its first bytes belong to this allocator. The
        // layout is not empty, because the caller guarantees a size above 0, and the product of
        // step and class cannot overflow.
        unsafe {
            let first = &mut (*self.free.get())[class];
            let block = *first;
            if block.is_null() {
                return self
                    .beneath
                    .alloc(Layout::from_size_align_unchecked(class * STEP, ALIGN));
            }
            *first = block.cast::<*mut u8>().read();
            block
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = Self::class(layout) else {
            // SAFETY: a block without a class came from `beneath`.
            return unsafe { self.beneath.dealloc(block, layout) };
        };
        // SAFETY: as in `alloc`; a block has room for a pointer and is aligned for one.
        unsafe {
            let first = &mut (*self.free.get())[class];
            block.cast::<*mut u8>().write(*first);
            *first = block;
        }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller guarantees that the new layout is valid.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (Self::class(layout), Self::class(wanted)) {
            // SAFETY: a block without a class came from `beneath`.
            (None, None) => unsafe { self.beneath.realloc(block, layout, size) },
            (Some(had), Some(class)) if had == class => block,
            _ => {
                // SAFETY: both blocks hold at least as many bytes as are copied, and they do not
                // overlap.
                unsafe {
                    let other = self.alloc(wanted);
                    if !other.is_null() {
                        ptr::copy_nonoverlapping(block, other, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    other
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::System;
    use std::cell::Cell;

    use super::*;

    /// Counts the allocations, and the bytes that have not been freed.
    #[derive(Default)]
    struct Counting {
        calls: Cell<usize>,
        bytes: Cell<usize>,
    }

    // SAFETY: forwards to the system allocator.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            self.calls.update(|n| n + 1);
            self.bytes.update(|n| n + layout.size());
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            self.bytes.update(|n| n - layout.size());
            unsafe { System.dealloc(block, layout) }
        }
    }

    /// A block filled with its number.
    struct Block {
        at: *mut u8,
        layout: Layout,
        number: u8,
    }

    impl Block {
        fn new(heap: &Heap<Counting>, layout: Layout, number: u8) -> Self {
            let at = unsafe { heap.alloc(layout) };
            assert!(
                !at.is_null() && (at as usize).is_multiple_of(layout.align()),
                "{layout:?}"
            );
            unsafe { at.write_bytes(number, layout.size()) };
            Self { at, layout, number }
        }

        fn check(&self, bytes: usize) {
            let bytes = unsafe { std::slice::from_raw_parts(self.at, bytes) };
            assert!(
                bytes.iter().all(|&byte| byte == self.number),
                "{:?} holds bytes of another block",
                self.layout
            );
        }

        fn resize(&mut self, heap: &Heap<Counting>, size: usize) {
            self.at = unsafe { heap.realloc(self.at, self.layout, size) };
            self.check(self.layout.size().min(size));
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            unsafe { self.at.write_bytes(self.number, size) };
        }

        fn free(self, heap: &Heap<Counting>) {
            self.check(self.layout.size());
            unsafe { heap.dealloc(self.at, self.layout) };
        }
    }

    /// A linear congruential generator (Knuth), which avoids a dependency on a random number crate.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }

        fn layout(&mut self) -> Layout {
            let align = [1, 2, 4, 8, 16, 64][self.below(6)];
            let size = [
                1 + self.below(64),
                1 + self.below(2 * MAX_SMALL),
                MAX_SMALL - 1 + self.below(3),
            ][self.below(3)];
            Layout::from_size_align(size, align).unwrap()
        }
    }

    #[test]
    fn a_block_has_one_owner_until_it_is_freed() {
        for seed in 0..50 {
            let heap = Heap::above(Counting::default());
            let mut chance = Chance(seed);
            let mut held: Vec<Block> = Vec::new();
            for n in 0..4_000 {
                let at = (!held.is_empty()).then(|| chance.below(held.len()));
                match (chance.below(5), at) {
                    (0 | 1, Some(at)) => held.swap_remove(at).free(&heap),
                    (2, Some(at)) => held[at].resize(&heap, chance.layout().size()),
                    _ => held.push(Block::new(&heap, chance.layout(), n as u8)),
                }
            }
            held.into_iter().for_each(|block| block.free(&heap));
        }
    }

    #[test]
    fn repeated_allocations_reach_the_underlying_allocator_once() {
        let heap = Heap::above(Counting::default());
        let event = |seed| {
            let mut chance = Chance(seed);
            let sizes =
                (0..200).map(|_| Layout::from_size_align(1 + chance.below(MAX_SMALL), 4).unwrap());
            let held: Vec<_> = sizes.map(|layout| Block::new(&heap, layout, 1)).collect();
            held.into_iter().for_each(|block| block.free(&heap));
            heap.beneath.calls.get()
        };
        let once = event(1);
        assert!((0..1_000).all(|_| event(1) == once));
        // With varying events the heap holds, for each size, no more than the peak usage.
        for seed in 2..1_000 {
            event(seed);
        }
        assert!(
            heap.beneath.bytes.get() < 4 * 200 * MAX_SMALL,
            "{} bytes",
            heap.beneath.bytes.get()
        );
    }

    #[test]
    fn large_blocks_are_returned_to_the_underlying_allocator() {
        let heap = Heap::above(Counting::default());
        for align in [1, 8, 64] {
            let mut block = Block::new(
                &heap,
                Layout::from_size_align(MAX_SMALL + 1, align).unwrap(),
                7,
            );
            block.resize(&heap, 100_000);
            block.free(&heap);
        }
        assert_eq!(heap.beneath.bytes.get(), 0);
    }
}
