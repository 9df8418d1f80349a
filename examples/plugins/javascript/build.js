// Makes build/parcels.wasm of parcels.js. Without these features of the engine it imports nothing but the plugin contract.

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
