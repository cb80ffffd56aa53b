-- Appends one event to a dense hash chain and answers its sequence. The head row is the last lock of its transaction.
-- Same contract as before; besides, the event gets its place in the tenant's feed: the id of its transaction, or that of
-- the event before it where that is higher, so that the feed keeps the order of the stream. A place is never below the
-- id of its own transaction, so nothing can come to stand below the oldest one that runs.
CREATE OR REPLACE FUNCTION engine_append_event_v1(p_tenant uuid, p_stream text, p_kind text, p_actor text, p_payload jsonb)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_seq  bigint;
    v_prev bytea;
    v_hash bytea;
    v_at   timestamptz;
    v_feed xid8;
    v_text text := p_payload::text;
BEGIN
    SELECT last_seq + 1, last_hash, last_position INTO v_seq, v_prev, v_feed FROM event_streams
        WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO event_streams (tenant_id, stream) VALUES (p_tenant, p_stream) ON CONFLICT DO NOTHING;
        SELECT last_seq + 1, last_hash, last_position INTO v_seq, v_prev, v_feed FROM event_streams
            WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
    END IF;
    v_at := clock_timestamp();
    v_feed := GREATEST(v_feed, pg_current_xact_id());
    v_hash := engine_event_hash_v1(p_tenant, p_stream, v_seq, v_prev, p_kind, p_actor, v_at, v_text);
    INSERT INTO events (tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload, feed_position)
        VALUES (p_tenant, p_stream, v_seq, v_prev, v_hash, p_kind, p_actor, v_at, v_text, v_feed);
    UPDATE event_streams SET last_seq = v_seq, last_hash = v_hash, last_position = v_feed
        WHERE tenant_id = p_tenant AND stream = p_stream;
    RETURN v_seq;
END
$$;
