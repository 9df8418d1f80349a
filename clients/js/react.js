// A React hook for the notifications of one user.

import { useCallback, useEffect, useRef, useState } from 'react';
import { connect } from './index.js';

const START = { notifications: [], state: 'connecting' };

/** See react.d.ts. */
export function useNotifications(url, { limit = 100, ...options } = {}) {
  const [view, setView] = useState(START);
  const latest = useRef(options);
  const connection = useRef(null);
  // Handlers are often new functions on each render; they do not open a new connection.
  useEffect(() => { latest.current = options; });
  const { user, device, shared, timeout, token } = options;
  const isSignedOut = !url || user === null;
  const hasToken = Boolean(token);
  useEffect(() => {
    setView(START);
    if (isSignedOut) return undefined;
    const current = connect(url, {
      ...latest.current,
      token: hasToken ? (request) => latest.current.token(request) : undefined,
      onGap: (gap) => latest.current.onGap?.(gap),
      onState: (state, detail) => {
        setView((view) => ({ ...view, state }));
        return latest.current.onState?.(state, detail);
      },
      onNotification: (notification, context) => {
        setView((view) => ({ ...view, notifications: [notification, ...view.notifications].slice(0, limit) }));
        return latest.current.onNotification?.(notification, context);
      },
    });
    connection.current = current;
    return () => {
      current.close();
      connection.current = null;
    };
  }, [String(url), isSignedOut, user, device, shared, timeout, hasToken, limit]);
  const markRead = useCallback(async (id) => connection.current?.markRead(id), []);
  const clear = useCallback(() => setView((view) => ({ ...view, notifications: [] })), []);
  return { ...view, markRead, clear };
}
