-- Deciding tickets, as version 2, where who was asked first no longer counts once a ticket was handed on to a wider circle.

-- Why a voter cannot be counted, or null. Nobody decides what they asked for themselves, or had asked for by delegation.
CREATE FUNCTION engine_refused_vote_v3(p_ticket approval_tickets, p_principal jsonb, c jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF p_ticket.requested_by = (c ->> 'voter')::uuid OR COALESCE(p_principal -> 'delegated_by', '[]') ? (c ->> 'voter') THEN
        RETURN jsonb_build_object('reason', 'separation_of_duties',
            'message', 'the requester of a call cannot decide its approval, nor can who had it requested');
    ELSIF p_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('reason', 'approval_expired',
            'message', format('the deadline %s has passed; the call is denied', p_ticket.deadline));
    ELSIF p_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('reason', 'already_decided',
            'message', format('the ticket is already %s', p_ticket.state));
    ELSIF (p_ticket.escalated_at IS NOT NULL) <> (c -> 'escalated')::boolean THEN
        RETURN jsonb_build_object('reason', 'escalated',
            'message', 'the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope');
    ELSIF EXISTS (SELECT FROM approval_votes
                  WHERE tenant_id = p_ticket.tenant_id AND ticket_id = p_ticket.id AND voter = (c ->> 'voter')::uuid
                    AND vote <> c ->> 'vote') THEN
        RETURN jsonb_build_object('reason', 'already_voted',
            'message', 'you have voted on this ticket before, the other way; a vote is given once');
    END IF;
    RETURN NULL;
END
$$;

-- Counts one vote: a denial ends the ticket, and so do `quorum` approvals by different people inside the deadline, each given
-- with the authority that is asked for now. Who approved before that was asked for may approve again, with it.
-- Answers {"status": "decided" | "counted" | "refused", ...}; the same vote by the same person again answers the same.
CREATE FUNCTION engine_decide_ticket_v3(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant    uuid := (c ->> 'tenant_id')::uuid;
    v_id        uuid := (c ->> 'ticket_id')::uuid;
    v_voter     uuid := (c ->> 'voter')::uuid;
    v_authority text[] := ARRAY(SELECT jsonb_array_elements_text(c -> 'authority'));
    v_run       run_states;
    v_was       text;
    v_ticket    approval_tickets;
    v_refusal   jsonb;
    v_votes     integer;
    v_state     text;
    v_scope     jsonb;
BEGIN
    PERFORM engine_enter_v1(v_tenant);
    SELECT run_id INTO v_ticket.run_id FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = v_id;
    END IF;
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id FOR UPDATE;
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id FOR UPDATE;
    -- Tickets that version 1 decided have a decider and no votes.
    IF EXISTS (SELECT FROM approval_votes WHERE tenant_id = v_tenant AND ticket_id = v_id AND voter = v_voter
               AND vote = c ->> 'vote' AND (authority @> v_authority OR v_ticket.state <> 'pending'))
       OR (v_ticket.decided_by = v_voter AND v_ticket.state = CASE c ->> 'vote' WHEN 'approve' THEN 'approved' ELSE 'denied' END)
    THEN
        RETURN jsonb_build_object('status', CASE v_ticket.state WHEN 'pending' THEN 'counted' ELSE 'decided' END,
            'run_id', v_ticket.run_id, 'replayed', true, 'deliver', false);
    END IF;
    v_was := v_ticket.state;
    v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
    v_refusal := engine_refused_vote_v3(v_ticket, v_run.principal, c);
    IF v_refusal IS NOT NULL THEN
        RETURN v_refusal || jsonb_build_object('status', 'refused', 'run_id', v_ticket.run_id,
            'deliver', v_was = 'pending' AND v_ticket.state = 'expired');
    END IF;

    INSERT INTO approval_votes (tenant_id, ticket_id, voter, vote, comment, authority, scope_uses, scope_seconds,
            scope_any_resource)
        VALUES (v_tenant, v_id, v_voter, c ->> 'vote', c ->> 'comment', v_authority,
            (c #>> '{scope,uses}')::integer, (c #>> '{scope,seconds}')::double precision,
            (c #>> '{scope,any_resource}')::boolean)
        ON CONFLICT (tenant_id, ticket_id, voter) DO UPDATE SET comment = EXCLUDED.comment, authority = EXCLUDED.authority,
            scope_uses = EXCLUDED.scope_uses, scope_seconds = EXCLUDED.scope_seconds,
            scope_any_resource = EXCLUDED.scope_any_resource, voted_at = EXCLUDED.voted_at;
    SELECT count(*) INTO v_votes FROM approval_votes
        WHERE tenant_id = v_tenant AND ticket_id = v_id AND vote = 'approve' AND authority @> v_authority;
    v_state := CASE WHEN c ->> 'vote' = 'deny' THEN 'denied' WHEN v_votes >= (c ->> 'quorum')::integer THEN 'approved' END;
    IF v_state IS NOT NULL THEN
        UPDATE approval_tickets SET state = v_state, decided_at = clock_timestamp(), decided_by = v_voter,
                comment = c ->> 'comment'
            WHERE tenant_id = v_tenant AND id = v_id AND state = 'pending';
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id AND state = 'awaiting_approval';
    END IF;
    IF v_state = 'approved' THEN
        v_scope := engine_leave_approval_scope_v2(v_ticket, v_run.agent_id, v_voter, (c ->> 'scope_id')::uuid);
    END IF;
    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_ticket.run_id,
        CASE WHEN v_state IS NULL THEN 'approval_voted' ELSE 'approval_decided' END, c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('ticket_id', v_id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'vote', c ->> 'vote', 'votes', v_votes, 'quorum', (c ->> 'quorum')::integer, 'authority', c -> 'authority',
            'decision', v_state, 'digest', v_ticket.digest, 'comment', NULLIF(c ->> 'comment', ''), 'scope', v_scope)));
    RETURN jsonb_build_object('status', CASE WHEN v_state IS NULL THEN 'counted' ELSE 'decided' END,
        'run_id', v_ticket.run_id, 'replayed', false, 'deliver', v_state IS NOT NULL);
END
$$;
