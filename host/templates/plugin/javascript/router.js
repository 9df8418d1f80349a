// Routes order events to the order's owner and to the group of its region.
//
// 64-bit integers of the contract are numbers, exact up to 2^53. An `err` of the contract is thrown as
// a plain value.

/** The event attribute that names the owner of the order. */
let owner = 'owner';

export const lifecycle = {
  // Only what is listed here is available in `resolve`.
  describe: () => ({
    name: 'my-plugin',
    version: '0.1.0',
    description: 'A router for Pointsman',
    types: ['order.*'],
    reads: { attributes: [owner], fields: ['/order/region'], payload: false },
    configSchema: JSON.stringify({
      type: 'object',
      additionalProperties: false,
      properties: { owner: { type: 'string', minLength: 1 } },
    }),
    options: [],
  }),

  configure(config) {
    const { owner: name = owner } = JSON.parse(config);
    if (typeof name !== 'string' || name === '') {
      throw [{ path: 'owner', message: 'name an attribute, such as customer' }];
    }
    owner = name;
  },
};

export const router = {
  resolve(event) {
    const id = text(event, owner);
    const region = text(event, '/order/region');
    const routes = [];
    if (id !== undefined) routes.push({ targets: [{ tag: 'user', val: id }], options: [] });
    if (region !== undefined) routes.push({ targets: [{ tag: 'group', val: `region-${region}` }], options: [] });
    return routes;
  },
};

function text({ attributes }, name) {
  const value = attributes.find((attribute) => attribute.name === name)?.value;
  return value?.tag === 'text' ? value.val : undefined;
}
