// Builds build/parcels.wasm from parcels.js. With these engine features disabled it imports only
// the plugin contract.

import { mkdir, writeFile } from 'node:fs/promises';
import { componentize } from '@bytecodealliance/componentize-js';

process.chdir(import.meta.dirname);
const { component } = await componentize({
  sourcePath: 'parcels.js',
  witPath: '../../../wit',
  worldName: 'full-plugin',
  disableFeatures: ['stdio', 'random', 'clocks', 'http', 'fetch-event'],
});
await mkdir('build', { recursive: true });
await writeFile('build/parcels.wasm', component);
