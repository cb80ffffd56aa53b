-- Appends one event to a dense hash chain and answers its sequence. The head row is the last lock of its transaction.
-- The contract of version 1; the event and the moved head are written by one statement.
CREATE FUNCTION engine_append_event_v3(p_tenant uuid, p_stream text, p_kind text, p_actor text, p_payload jsonb)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_seq    bigint;
    v_prev   bytea;
    v_feed   xid8;
    v_at     timestamptz;
    v_hash   bytea;
    v_text   text := p_payload::text;
    v_tenant bytea := convert_to(p_tenant::text, 'UTF8');
    v_stream bytea := convert_to(p_stream, 'UTF8');
    v_kind   bytea := convert_to(p_kind, 'UTF8');
    v_actor  bytea := convert_to(p_actor, 'UTF8');
    v_bytes  bytea := convert_to(v_text, 'UTF8');
BEGIN
    FOR v_try IN 1..2 LOOP
        SELECT last_seq + 1, last_hash, GREATEST(last_position, pg_current_xact_id()) INTO v_seq, v_prev, v_feed
            FROM event_streams WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO event_streams (tenant_id, stream) VALUES (p_tenant, p_stream) ON CONFLICT DO NOTHING;
    END LOOP;
    v_at := clock_timestamp();
    v_hash := sha256(
        int4send(octet_length(v_tenant)) || v_tenant || int4send(octet_length(v_stream)) || v_stream || int8send(v_seq)
        || int4send(octet_length(v_prev)) || v_prev || int4send(octet_length(v_kind)) || v_kind
        || int4send(octet_length(v_actor)) || v_actor || int8send((extract(epoch FROM v_at) * 1000000)::bigint)
        || int4send(octet_length(v_bytes)) || v_bytes);
    WITH event AS (
        INSERT INTO events (tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload, feed_position)
            VALUES (p_tenant, p_stream, v_seq, v_prev, v_hash, p_kind, p_actor, v_at, v_text, v_feed))
    UPDATE event_streams SET last_seq = v_seq, last_hash = v_hash, last_position = v_feed
        WHERE tenant_id = p_tenant AND stream = p_stream;
    RETURN v_seq;
END
$$;
