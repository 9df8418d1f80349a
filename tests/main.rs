mod conformance;
mod embedded;
mod harness;
