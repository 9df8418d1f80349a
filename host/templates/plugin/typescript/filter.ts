// Drops orders from the test system and raises the priority of large orders.
//
// 64-bit integers of the contract are numbers, exact up to 2^53. An `err` of the contract is thrown as
// a plain value.

/** The minimum total of a large order. */
let large = 1000;

export const lifecycle: Pointsman.Lifecycle = {
  // Only what is listed here is available in `evaluate`.
  describe: () => ({
    name: 'my-plugin',
    version: '0.1.0',
    description: 'A filter for Pointsman',
    types: ['order.*'],
    reads: { attributes: ['test'], fields: ['/order/total'], payload: false },
    configSchema: JSON.stringify({
      type: 'object',
      additionalProperties: false,
      properties: { large: { type: 'number', exclusiveMinimum: 0 } },
    }),
    options: [],
  }),

  configure(config: string) {
    const { large: total = large }: { large?: unknown } = JSON.parse(config);
    if (typeof total !== 'number' || total <= 0) {
      const issue: Pointsman.Issue = { path: 'large', message: 'give a number above 0' };
      throw [issue];
    }
    large = total;
  },
};

export const filter: Pointsman.Filter = {
  evaluate(event: Pointsman.Event): Pointsman.Verdict {
    // Attributes of events added with XADD are always text.
    const test = value(event, 'test')?.val;
    if (test === true || test === 'true') return { tag: 'drop', val: 'order from the test system' };
    const total = value(event, '/order/total');
    if (total?.tag !== 'integer' && total?.tag !== 'decimal') return { tag: 'keep' };
    if (Number(total.val) < large) return { tag: 'keep' };
    // Plugins called after this one see the attribute.
    const desk: Pointsman.Attribute = { name: 'desk', value: { tag: 'text', val: 'large' } };
    return { tag: 'amend', val: { priority: 'high', attributes: [desk], options: [] } };
  },
};

function value({ attributes }: Pointsman.Event, name: string): Pointsman.Value | undefined {
  return attributes.find((attribute) => attribute.name === name)?.value;
}
