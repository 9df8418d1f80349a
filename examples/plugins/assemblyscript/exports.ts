// The exports of the module: those of every plugin, and those of its kind. AssemblyScript cannot give
// them their names of the contract; pointsman/exports.mjs does, when the module is compiled.

export * from "./pointsman/lifecycle";
export * from "./pointsman/filter";
export * from "./pointsman/router";
