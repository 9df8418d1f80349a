mod conformance;
mod harness;
