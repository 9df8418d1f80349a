// A transform of the AssemblyScript compiler: gives the exported functions their names of the
// contract, which are not identifiers of the language. `router_resolve` becomes
// `pointsman:plugin/router@0.1.0#resolve`.

import binaryen from 'assemblyscript/binaryen';

const INTERFACES = ['lifecycle', 'filter', 'router'];

export function afterCompile(module) {
  for (let i = 0; i < module.getNumExports(); i++) {
    const { name, value } = binaryen.getExportInfo(module.getExportByIndex(i));
    const [interface_, function_] = name.split('_');
    if (!INTERFACES.includes(interface_)) continue;
    module.removeExport(name);
    module.addFunctionExport(value, `pointsman:plugin/${interface_}@0.1.0#${function_}`);
    i = -1;
  }
}
