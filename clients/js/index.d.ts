/** A notification as a node sends it; `Data` is the type of the event's payload. */
export interface Notification<Data = unknown> {
  id: string;
  source: string;
  type: string;
  /** RFC 3339. */
  time: string;
  priority: 'low' | 'normal' | 'high' | 'urgent';
  /** The router whose route won. */
  by: string;
  /** The target that reached this user: `u:NAME`, `g:NAME` or `all`. */
  to: string;
  /** Tells several notifications of one event apart. */
  slot?: string;
  data?: Data;
  [attribute: string]: unknown;
}

/** A range of history that may be incomplete. */
export interface Gap {
  reason: 'trimmed' | 'rewound' | 'unknown';
  partition?: number;
  from?: string;
  to?: string;
}

/**
 * - `connecting`: before the first connection, or after one that ended
 * - `live`: each notification arrives as soon as it is published
 * - `offline`: the last attempt failed, or the browser is offline
 * - `refused`: the node answered with an error of the client, such as 401 or 403
 * - `closed`: by `close()` or the `signal`
 *
 * In every state except `closed`, further attempts follow.
 */
export type State = 'connecting' | 'live' | 'offline' | 'refused' | 'closed';

/** Why the connection ended; empty in tabs that do not hold it. */
export interface StateDetail {
  /** The reason of a `close`, such as `drain`, `age` or `token-expired`. */
  reason?: string;
  /** The status of the response, if it was not a stream. */
  status?: number;
  error?: unknown;
  /** Milliseconds until the next attempt. */
  delay?: number;
}

export interface Context {
  /** The SSE id, for `markRead`. */
  id: string | undefined;
  /** The SSE event name, `message` unless the route sets one. */
  event: string;
  /** True in the one tab that holds the connection: play sounds and raise system notifications there. */
  isLeading: boolean;
}

export interface Options<Data = unknown> {
  /** The user, under which the position is stored; by default the parameter `user` of the URL. */
  user?: string;
  /**
   * Called for each notification, one after another; a returned promise is awaited. The position is
   * stored when it has run, so a tab that is closed before shows the notification again. An
   * error is reported and does not repeat the call.
   */
  onNotification?: (notification: Notification<Data>, context: Context) => unknown;
  onGap?: (gap: Gap) => unknown;
  onState?: (state: State, detail: StateDetail) => unknown;
  /**
   * Returns the token that is sent as `Authorization`, or renews the cookie and returns nothing.
   * Called before the first request, and with `isRenewal` when the node refuses the token or it is
   * about to expire. If it throws, the next attempt calls it again. Without it, cookies are sent.
   */
  token?: (request: { isRenewal: boolean }) => string | null | undefined | void | Promise<string | null | undefined | void>;
  /** The name of this device: what was shown is acknowledged, and a device without a stored position resumes there. */
  device?: string;
  /** Ends the connection when it aborts. */
  signal?: AbortSignal;
  /** Whether the tabs of the browser share one connection, where it has Web Locks (true). */
  shared?: boolean;
  /** Where the position is stored (`localStorage`, where it exists); `null`: only in memory. */
  storage?: Pick<Storage, 'getItem' | 'setItem'> | null;
  /**
   * Milliseconds without a byte after which a connection counts as broken (45,000); more than
   * `stream.heartbeat_interval` of the nodes. Another tab takes over from one that hangs after
   * about three times as long.
   */
  timeout?: number;
}

export class Connection<Data = unknown> {
  constructor(url: string | URL, options?: Options<Data>);
  readonly state: State;
  /** The id up to which the handler ran; empty before the first. */
  readonly position: string;
  /** Moves the user's read marker to an id, by default to everything shown. Rejects if it is not stored. */
  markRead(id?: string): Promise<void>;
  /**
   * Ends the connection of this tab; no handler is called afterwards. Resolves when the node has
   * answered the last acknowledgement, if there was one.
   */
  close(): Promise<void>;
}

/**
 * Opens a connection to `/v1/stream` of a node; the parameters of the URL (`types`,
 * `min_priority`) select notifications.
 *
 * @throws TypeError without a user or with an invalid URL.
 */
export function connect<Data = unknown>(url: string | URL, options?: Options<Data>): Connection<Data>;
